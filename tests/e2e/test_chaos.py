"""Workers that are killed, suspended and continued at random moments, under streams of both dialects.

Whatever happens to the worker, each request ends exactly once, and nothing of it stays behind.
"""

import json
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import Service, Start, ready
from tests.waiting import wait_for

pytestmark = pytest.mark.e2e

CLIENTS = 6
KILL_SECONDS = 5
END_SECONDS = 25
"""Within which each request has to end, whatever happens: the limit of a suspended worker, and a busy machine."""
RECOVERY_SECONDS = 90
STORY: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 300}
KINDS = ("kill", "blink", "suspend", "hang", "hang up")


@dataclass
class Outcome:
    """What one client saw."""

    status: int = 0
    ends: list[str] = field(default_factory=list)
    """The terminal events: done or error."""
    retry_after: bool = False
    after_end: int = 0
    """Events after the first terminal one."""


def native(client: httpx.Client, outcome: Outcome, hang_up: bool) -> None:
    body = {**STORY, "stream": True, "cache": False, "ignore_eos": True}
    with client.stream("POST", "/v1/chat", json=body) as response:
        outcome.status, outcome.retry_after = response.status_code, "retry-after" in response.headers
        for number, line in enumerate(response.iter_lines()):
            if hang_up and number > 8:
                return
            if line.startswith("event: "):
                outcome.after_end += bool(outcome.ends)
                if line in ("event: done", "event: error"):
                    outcome.ends.append(line.removeprefix("event: "))


def openai(client: httpx.Client, outcome: Outcome, hang_up: bool) -> None:
    body = {**STORY, "stream": True, "model": "tiny-chat"}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        outcome.status, outcome.retry_after = response.status_code, "retry-after" in response.headers
        for number, line in enumerate(response.iter_lines()):
            if hang_up and number > 8:
                return
            data = line.removeprefix("data: ")
            if not line.startswith("data: ") or data == "[DONE]":
                continue
            event = json.loads(data)
            outcome.after_end += bool(outcome.ends)
            if "error" in event:
                outcome.ends.append("error")
            elif any(choice["finish_reason"] for choice in event["choices"]):
                outcome.ends.append("done")


def whole(client: httpx.Client, outcome: Outcome, hang_up: bool) -> None:
    response = client.post("/v1/generate", json={"prompt": "Tell me a story", "max_tokens": 200, "cache": False})
    outcome.status, outcome.retry_after = response.status_code, "retry-after" in response.headers
    outcome.ends.append("done" if response.status_code == 200 else "error")


class Chaos:
    """A service under load whose worker is maltreated round after round."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        created = service.client.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})
        assert 201 == created.status_code, created.text
        self.key = created.json()["key"]

    def round(self, kind: str) -> None:
        """Let clients ask, do something to the worker, and see that all have ended once and the service serves."""
        outcomes = [Outcome() for _ in range(CLIENTS)]
        ways = (native, openai, whole)
        threads = [
            threading.Thread(target=self._send_request, args=(ways[number % len(ways)], outcome, kind == "hang up"))
            for number, outcome in enumerate(outcomes)
        ]
        for thread in threads:
            thread.start()
        time.sleep(self.random.uniform(0, 1.5))
        worker = self.service.worker()
        began = time.monotonic()
        self._maltreat(worker, kind)
        for thread in threads:
            thread.join(max(0.1, END_SECONDS - (time.monotonic() - began)))
        assert not any(thread.is_alive() for thread in threads), (kind, outcomes)
        if kind != "hang up":
            self._check(kind, outcomes)
        wait_for(lambda: ready(self.service), RECOVERY_SECONDS)
        assert self.service.chat("What is the capital of France?", max_tokens=5, cache=False)["message"]["content"]
        wait_for(lambda: self._engine("running") == self._engine("waiting") == 0)

    def nothing_is_left(self) -> None:
        """No reservation of tokens, and no process besides the worker and its spare."""
        wait_for(lambda: self._rows("SELECT count(*) FROM reservations WHERE tokens > 0") == 0)
        assert 0 == self._rows("SELECT coalesce(sum(reserved), 0) FROM usage_counters")
        workers = [each for each in self._process().children() if "app.worker" in each.cmdline()]
        assert len(workers) <= 2

    def figures(self) -> tuple[int, int]:
        """Return the open files and the memory of the API process, in bytes."""
        return self._process().num_fds(), self._process().memory_info().rss

    def _send_request(self, way: Any, outcome: Outcome, hang_up: bool) -> None:
        with httpx.Client(base_url=self.service.url, headers={"X-API-Key": self.key}, timeout=END_SECONDS) as client:
            time.sleep(self.random.uniform(0, 0.8))
            with suppress(httpx.TransportError):
                way(client, outcome, hang_up)

    def _maltreat(self, worker: psutil.Process, kind: str) -> None:
        match kind:
            case "kill":
                worker.kill()
            case "blink":
                worker.suspend()
                time.sleep(self.random.uniform(0, 1))
                worker.resume()
            case "suspend":
                worker.suspend()
                wait_for(lambda: self.service.get("/readyz").json()["status"] == "unresponsive")
                worker.resume()
            case "hang":
                worker.suspend()
                wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)

    def _check(self, kind: str, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self.seen.update(outcome.ends)
            assert outcome.status in (200, 503), (kind, outcome)
            if outcome.status == 503:
                assert outcome.retry_after, (kind, outcome)
            else:
                assert (1, 0) == (len(outcome.ends), outcome.after_end), (kind, outcome)

    def _engine(self, figure: str) -> int:
        return int(self.service.engine()[figure])

    def _process(self) -> psutil.Process:
        return psutil.Process(self.service.process.pid)

    def _rows(self, query: str) -> int:
        with closing(sqlite3.connect(self.service.log.parent / "data" / "service.db")) as database:
            return int(database.execute(query).fetchone()[0])


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("kinds", "seed"),
    [
        pytest.param(("suspend", "hang up"), 1, marks=pytest.mark.soak, id="short"),
        pytest.param(KINDS * 6, 2, id="long", marks=pytest.mark.chaos),
    ],
)
def test_whatever_happens_to_the_worker_each_request_ends_once_and_nothing_stays(
    kinds: tuple[str, ...], seed: int, start: Start
) -> None:
    """Terminal events, refusals with a time to come back, reservations, processes, open files and memory."""
    # Slow enough that most answers are not over before it happens.
    service = start(MODEL__COMPILE="none", MODEL__HANG_SECONDS=str(KILL_SECONDS), MODEL__SPARE_WORKER="true")
    chaos = Chaos(service, seed)
    chaos.round("kill")
    chaos.nothing_is_left()
    files, memory = chaos.figures()

    order = list(kinds)
    chaos.random.shuffle(order)
    for kind in order:
        chaos.round(kind)

    chaos.nothing_is_left()
    files_after, memory_after = chaos.figures()
    assert files_after <= files + 8  # idle connections to the database come and go
    assert memory_after < memory + 50e6
    assert chaos.seen["error"] > 0
    assert service.logged("was replaced within")
    assert "Traceback" not in service.log.read_text()
    assert 0 == service.stop(30)


def test_a_suspended_worker_turns_readiness_off_within_seconds(start: Start) -> None:
    """A load balancer learns it, clients are told to come back, and both see when the worker is continued."""
    service = start()
    worker = service.worker()
    worker.send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: service.get("/readyz").status_code == 503)
        assert {"status": "unresponsive"} == service.get("/readyz").json()
        assert 200 == service.get("/health").status_code
        refused = service.client.post("/v1/chat", json=STORY)
        assert (503, "service_unavailable") == (refused.status_code, refused.json()["error"])
        assert int(refused.headers["retry-after"]) > 0
    finally:
        worker.send_signal(signal.SIGCONT)

    wait_for(lambda: ready(service))
    assert "Paris" in service.chat("What is the capital of France?")["message"]["content"]
    assert (0, worker.pid) == (service.engine()["restarts"], service.engine()["worker_pid"])
    assert (1, 1) == (service.logged("gives no sign of life"), service.logged("lives and serves again"))
