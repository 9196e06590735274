"""Load for a running service: people who chat, hold sessions and read streams.  `make load` runs it.

The key is LLM_API_KEY, or that of data/api_key; the model LLM_MODEL, or the embedded one.  Beside the requests locust
shows the time to the first token of each stream.  All of them together may send more than `rate_limit` allows one key:
raise it for the service that is tried.
"""

import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

from locust import HttpUser, between, task

QUESTIONS = (
    "What is the capital of France?",
    "Count from 1 to 10",
    "Tell me a story",
    "What is 17 plus 25?",
    "Which animal is larger, a cat or a horse?",
)

MODEL = os.environ.get("LLM_MODEL", "tiny-chat")


def _key() -> str:
    return os.environ.get("LLM_API_KEY") or Path("data/api_key").read_text().strip()


class ChatUser(HttpUser):
    """A person: asks, waits for the answer, thinks for a moment."""

    wait_time = between(0.1, 1)

    def on_start(self) -> None:
        self.client.headers["X-API-Key"] = _key()
        self.session_id = f"load-{uuid.uuid4().hex[:12]}"

    @task(3)
    def stream(self) -> None:
        """Read a stream; an error event in it is a failure, and so is an end without its last event."""
        body = self._body(stream=True)
        began, first, ended = time.perf_counter(), None, ""
        with self.client.post("/v1/chat", json=body, stream=True, catch_response=True, name="stream") as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            for line in response.iter_lines(decode_unicode=True):
                if line == "event: delta" and first is None:
                    first = time.perf_counter() - began
                elif line.startswith("event: "):
                    ended = line.removeprefix("event: ")
            if ended != "done":
                response.failure(f"ended with {ended or 'nothing'}")
        if first is not None:
            self.environment.events.request.fire(
                request_type="SSE", name="first token", response_time=first * 1000, response_length=0, exception=None
            )

    @task(2)
    def turn(self) -> None:
        """Take a turn of a session."""
        self.client.post("/v1/chat", json=self._body(session_id=self.session_id), name="turn of a session")

    @task(1)
    def whole(self) -> None:
        """Wait for a whole answer."""
        self.client.post("/v1/chat/completions", json=self._body(max_tokens=64, model=MODEL), name="OpenAI, whole")

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": random.choice(QUESTIONS)}], "max_tokens": 128, **fields}
