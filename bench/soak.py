"""Keep the service busy for half an hour, hang up on a fifth of the answers, and see that nothing is left behind.

    python -m bench.soak [--minutes 30] [--clients 8] [--model FOLDER]

Once a minute the load pauses and a line tells what the API process and the model's worker hold.  Exits with 1 if
memory, file descriptors or threads of either grew (`bench.leaks` says how much is too much), if a request failed, or if
the worker was started again.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.leaks import FEWEST, Sample, growth
from bench.process import KEY, ROOT, free_port, our_command, our_environment, serving, stop_on_sigterm

CANCELLED = 0.25
"""Share of the requests whose client means to hang up; some answers come sooner, and about a fifth is left."""
HANG_UP_SECONDS = 0.5
"""At most so long after the request was sent, or within so many frames of a stream."""
HANG_UP_FRAMES = 20
SLOTS = 32
"""KV cache slots; each is written from end to end before anything is judged."""
UNWRITTEN_TOKENS = 16
"""Tokens at the end of a slot that may stay unwritten, since prompts are sized in words: less than a page of a head."""
SESSIONS = 20
IDLE_SECONDS = 1.0
SHORTEST = 8
"""Lines of a run that is shorter than as many minutes."""
LOG_LINES = 20
PATIENCE_SECONDS = 300.0
SENTENCES = (
    "The cat sat by the window and looked at the rain.",
    "What is the capital of France?",
    "Tell me a story about a clever rabbit.",
    "My name is Tovin and I live near the sea.",
    "Please explain why the sky is blue.",
    "Write to jane.doe@example.com or call me tomorrow.",
    "How many days are there in a week?",
)


@dataclass
class Client:
    """Sends requests of all kinds, one after the other, and counts how they end."""

    http: httpx.AsyncClient
    draw: random.Random
    number: int
    outcomes: Counter[str]

    async def work(self, until: float) -> None:
        """Send requests until a time of the monotonic clock; the last response is read to its end."""
        while time.monotonic() < until:
            self.outcomes[await self._one()] += 1

    async def _one(self) -> str:
        path, body = self._request()
        hang_up = self.draw.random() < CANCELLED
        try:
            if body["stream"]:
                return await self._stream(path, body, self.draw.randrange(HANG_UP_FRAMES) if hang_up else None)
            async with asyncio.timeout(self.draw.uniform(0, HANG_UP_SECONDS) if hang_up else None):
                reply = await self.http.post(path, json=body)
        except TimeoutError:
            return "cancelled"
        except httpx.HTTPError as error:
            return f"failed: {type(error).__name__}"
        return "answered" if reply.status_code == 200 else f"failed: {reply.status_code} {reply.text[:200]}"

    async def _stream(self, path: str, body: dict[str, Any], frames: int | None) -> str:
        """Read a stream, or only so many of its frames."""
        async with self.http.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                return f"failed: {reply.status_code}"
            name, seen = "", 0
            async for line in reply.aiter_lines():
                if frames is not None and seen >= frames:
                    return "cancelled"
                if line.startswith("event: "):
                    name, seen = line.removeprefix("event: "), seen + 1
        return "answered" if name == "done" else f"failed: a stream ended with {name or 'nothing'}"

    def _request(self) -> tuple[str, dict[str, Any]]:
        """Draw a request: either route, short and long, greedy and not, whole and streamed, with and without memory."""
        draw = self.draw
        text = " ".join(draw.choices(SENTENCES, k=draw.choice((1, 2, 5, 20))))
        body: dict[str, Any] = {
            "max_tokens": draw.choice((1, 16, 64, 128)),
            "temperature": draw.choice((0, 0.7, 1.0)),
            "stream": draw.random() < 0.6,
            "cache": draw.random() < 0.3,
        }
        if draw.random() < 0.4:
            return "/v1/generate", {**body, "prompt": text}
        if draw.random() < 0.7:
            body["session_id"] = f"soak-{self.number}-{draw.randrange(SESSIONS)}"
        return "/v1/chat", {**body, "messages": [{"role": "user", "content": text}]}


async def fill_kv_cache(http: httpx.AsyncClient) -> None:
    """Write every slot of the KV cache once: its memory becomes resident as it is written, which is no leak.

    Raises: httpx.HTTPError: the service refused.
    """
    context = (await http.get("/status")).json()["model"]["context_length"]
    words = 100
    fields = {"max_tokens": 1, "cache": False}
    tried = await http.post("/v1/generate", json={**fields, "prompt": "the " * words})
    words = int((context - UNWRITTEN_TOKENS) / tried.raise_for_status().json()["usage"]["prompt_tokens"] * words)
    prompts = (f"{chr(97 + number % 26) * (1 + number // 26)} {'the ' * words}" for number in range(SLOTS))
    for reply in await asyncio.gather(
        *(http.post("/v1/generate", json={**fields, "prompt": each}) for each in prompts)
    ):
        reply.raise_for_status()


def sample(process: psutil.Process) -> Sample:
    """Look at a process from outside."""
    return Sample(process.memory_info().rss, process.num_fds(), process.num_threads())


async def soak(
    connect: Callable[[], httpx.AsyncClient], api: psutil.Process, minutes: float, clients: int
) -> list[str]:
    """Load the service; return what is wrong with it afterwards, in words.

    Args: connect: makes an HTTP client; each minute has its own, so that no idle connection is left when it is judged.
    """
    outcomes, restarts = Counter[str](), 0
    samples: dict[str, list[Sample]] = {"API": [], "worker": []}
    draws = [random.Random(number) for number in range(clients)]
    async with connect() as http:
        await fill_kv_cache(http)
    end, pause = time.monotonic() + 60 * minutes, min(60.0, 60 * minutes / SHORTEST)
    while time.monotonic() < end or len(samples["API"]) < FEWEST:
        async with connect() as http:
            senders = [Client(http, draw, number, outcomes) for number, draw in enumerate(draws)]
            await asyncio.gather(*(client.work(time.monotonic() + pause) for client in senders))
            engine = (await http.get("/status")).json()["engine"]
        await asyncio.sleep(IDLE_SECONDS)
        samples["API"].append(sample(api))
        samples["worker"].append(sample(psutil.Process(engine["worker_pid"])))
        print_line(end - time.monotonic(), outcomes, samples)
        restarts = engine["restarts"]
    return complaints(samples, outcomes, restarts)


def print_line(left_seconds: float, outcomes: Counter[str], samples: dict[str, list[Sample]]) -> None:
    """Print one line: time left, outcomes so far, what each process holds."""
    counts = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
    holds = "; ".join(f"{name} {taken[-1]}" for name, taken in samples.items() if taken)
    print(f"{max(0, left_seconds) / 60:5.1f} min left: {counts}; {holds}", flush=True)


def complaints(samples: dict[str, list[Sample]], outcomes: Counter[str], restarts: int) -> list[str]:
    """Return what is wrong after a run, in words."""
    wrong = [f"{name}: {what}" for name, taken in samples.items() for what in growth(taken)]
    wrong += [f"{count} requests {what}" for what, count in outcomes.items() if what.startswith("failed")]
    if restarts:
        wrong.append(f"the worker was started again {restarts} times")
    return wrong


def main() -> None:
    """Start the service, load it, and say whether anything was left behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-chat")
    arguments = parser.parse_args()
    stop_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        port = free_port()
        settings = {
            "MODEL__NAME": str(arguments.model.resolve()),
            "MODEL__MAX_BATCH_SIZE": str(SLOTS),
            "DEADLINES__WAITING_SECONDS": "600",
        }
        environment = our_environment(Path(folder), settings)
        connect = partial(
            httpx.AsyncClient, base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY}, timeout=PATIENCE_SECONDS
        )
        with serving(our_command(port), port, environment, "/readyz", Path(folder) / "log") as server:
            wrong = asyncio.run(soak(connect, server.tree()[0], arguments.minutes, arguments.clients))
            if wrong:
                print(*server.log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n")
    print("\n".join(wrong) or "Nothing was left behind.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
