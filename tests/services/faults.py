"""Faults of the worker, Redis and Postgres under load, and what clients of five kinds are answered meanwhile.

The service runs the embedded model.  Each client sends one request after the other; a fault comes, stays for some
seconds and is mended, and the round ends once every kind of request is served again.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.services.postgres import Postgres
from tests.services.process import ROOT, ServiceProcess, serving
from tests.services.redis_server import RedisServer
from tests.web.access import ADMIN_KEY

PATIENCE_SECONDS = 30.0
"""A request that has not ended by then hangs."""
HANG_SECONDS = 12.0
"""After which a worker without a sign of life is replaced here."""
RECOVERY_SECONDS = 90.0
"""A kind of request that is not served by then counts as never served."""
QUIET_SECONDS = 1.0
"""Of load before a fault, and after everybody is served again."""
PAUSE_SECONDS, RETRY_SECONDS = 0.2, 0.5
"""Between two requests of a client: after a good answer, and after another."""
SETTINGS = {
    "MODEL__ENGINE": "auto",
    "MODEL__NAME": str(ROOT / "models" / "tiny-chat"),
    "MODEL__THREADS": "1",
    "MODEL__COMPILE": "none",  # slow enough that a fault finds streams that run
    "MODEL__HANG_SECONDS": str(HANG_SECONDS),
    "RATE_LIMIT__ENABLED": "true",
    "RATE_LIMIT__REQUESTS_PER_MINUTE": "1000000",
    "RATE_LIMIT__BURST_SIZE": "1000000",
    "RATE_LIMIT__TOKENS_PER_MINUTE": "1000000000",
    "QUOTA__LEASE_SECONDS": "2",
}


@dataclass(frozen=True)
class Kind:
    """What one kind of client sends, again and again."""

    name: str
    path: str
    body: Mapping[str, object] | None = None
    """None: it is a GET."""
    has_quota: bool = False

    @property
    def is_stream(self) -> bool:
        return bool(self.body and self.body.get("stream"))


_STORY = {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 120, "ignore_eos": True}
_CHAT = "/v1/chat/completions"
KINDS = (
    Kind("stream", "/v1/chat", {**_STORY, "stream": True, "cache": False}),
    Kind("OpenAI, stream", _CHAT, {**_STORY, "stream": True, "model": "tiny-chat"}),
    Kind("OpenAI, whole, quota", _CHAT, {**_STORY, "model": "tiny-chat", "max_tokens": 24}, has_quota=True),
    Kind("turn of a session", "/v1/chat", {**_STORY, "max_tokens": 24, "cache": False}),
    Kind("list of keys", "/v1/keys"),
)


@dataclass(frozen=True)
class Outcome:
    """How one request ended."""

    kind: Kind
    sent: float
    ended: float
    said: str
    """Status and code, the last event of a stream, or `hung`."""

    @property
    def is_good(self) -> bool:
        return self.said in ("200", "done")

    @property
    def is_cut(self) -> bool:
        return self.said.startswith(("cut", "connection"))

    @property
    def is_nameless(self) -> bool:
        """Whether it is a 5xx without a code: a bug that somebody would have to look for."""
        return re.fullmatch(r"5\d\d ?", self.said) is not None


@dataclass
class Round:
    """One fault and what came of it; moments in seconds of the monotonic clock."""

    broken: float = 0.0
    mended: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def served_after(self, moment: float, kind: Kind) -> float | None:
        """Return the seconds until the first good answer to a request that was sent after a moment."""
        ends = [each.ended for each in self.outcomes if each.kind == kind and each.is_good and each.sent >= moment]
        return min(ends) - moment if ends else None

    @property
    def is_over(self) -> bool:
        return all(self.served_after(self.mended, kind) is not None for kind in KINDS)


@dataclass
class Stage:
    """The service and what it depends on."""

    service: ServiceProcess
    redis: RedisServer
    postgres: Postgres
    quota_key: str

    async def worker(self) -> psutil.Process:
        async with self.service.client() as http:
            return psutil.Process((await http.get("/status")).json()["engine"]["worker_pid"])


Fault = Callable[[Stage, float], Awaitable[float]]
"""Breaks something, mends it after some seconds and returns the moment it was mended."""


async def kill_worker(stage: Stage, seconds: float) -> float:
    """The service mends it itself: the moment is that of the fault."""
    (await stage.worker()).kill()
    return time.monotonic()


async def suspend_worker(stage: Stage, seconds: float) -> float:
    worker = await stage.worker()
    worker.suspend()
    await asyncio.sleep(min(seconds, HANG_SECONDS - 1))
    worker.resume()
    return time.monotonic()


async def hang_worker(stage: Stage, seconds: float) -> float:
    """Nobody continues it: the service kills and replaces it."""
    (await stage.worker()).suspend()
    return time.monotonic()


async def kill_redis(stage: Stage, seconds: float) -> float:
    stage.redis.kill()
    await asyncio.sleep(seconds)
    await asyncio.to_thread(stage.redis.start)
    return time.monotonic()


async def suspend_redis(stage: Stage, seconds: float) -> float:
    with stage.redis.stalled():
        await asyncio.sleep(seconds)
    return time.monotonic()


async def kill_postgres(stage: Stage, seconds: float) -> float:
    await asyncio.to_thread(stage.postgres.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(stage.postgres.start)
    return time.monotonic()


async def suspend_postgres(stage: Stage, seconds: float) -> float:
    with stage.postgres.stalled():
        await asyncio.sleep(seconds)
    return time.monotonic()


FAULTS: Mapping[str, Fault] = {
    "worker killed": kill_worker,
    "worker suspended, continued": suspend_worker,
    "worker suspended for good": hang_worker,
    "Redis killed, started again": kill_redis,
    "Redis suspended, continued": suspend_redis,
    "Postgres killed, started again": kill_postgres,
    "Postgres suspended, continued": suspend_postgres,
}


def code_of(body: str) -> str:
    """Return the code that an error names, in either dialect; empty where it names none."""
    try:
        error = json.loads(body)["error"]
        return str(error["code"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return ""


async def _read_stream(response: httpx.Response) -> str:
    """Return how a stream of either dialect ended; the last event of one that was cut."""
    name, last = "", "nothing"
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            if name == "done" or data == "[DONE]":
                # OpenAI's dialect ends a stream with an error in this way, too.
                return last if last.startswith("error") else "done"
            last = f"error {code_of(data)}".rstrip() if code_of(data) or name == "error" else name or "chunk"
    return last if last.startswith("error") else f"cut after {last}"


async def _answer(http: httpx.AsyncClient, kind: Kind, body: Mapping[str, object] | None) -> str:
    try:
        async with (
            asyncio.timeout(PATIENCE_SECONDS),
            http.stream("GET" if body is None else "POST", kind.path, json=body) as response,
        ):
            if kind.is_stream and response.status_code == 200:
                return await _read_stream(response)
            text = (await response.aread()).decode()
            return str(response.status_code) if response.is_success else f"{response.status_code} {code_of(text)}"
    except TimeoutError:
        return "hung"
    except httpx.TransportError as error:
        return f"connection: {type(error).__name__}"


class Load:
    """Clients of every kind, each its next request when the last has ended."""

    def __init__(self, stage: Stage, clients: int, found: Round) -> None:
        """Args: clients: of each kind."""
        self._stage, self._found = stage, found
        self._stopping = asyncio.Event()
        self._tasks = [asyncio.create_task(self._run(kind, number)) for kind in KINDS for number in range(clients)]

    async def stop(self) -> None:
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def _run(self, kind: Kind, number: int) -> None:
        body = kind.body
        if kind.name == "turn of a session":
            body = {**(kind.body or {}), "session_id": f"faults-{number}"}
        key = self._stage.quota_key if kind.has_quota else ADMIN_KEY
        async with self._stage.service.client(key) as http:
            http.timeout = httpx.Timeout(None)
            while not self._stopping.is_set():
                sent = time.monotonic()
                said = await _answer(http, kind, body)
                outcome = Outcome(kind, sent, time.monotonic(), said)
                self._found.outcomes.append(outcome)
                await asyncio.sleep(PAUSE_SECONDS if outcome.is_good else RETRY_SECONDS)


@asynccontextmanager
async def staged(redis: RedisServer, database: Postgres, url: str, folder: Path) -> AsyncIterator[Stage]:
    """Run the service until the block ends.  Args: url: of an empty database of that Postgres."""
    async with (
        serving(url, folder, prepare=None, REDIS__URL=redis.url, **SETTINGS) as service,
        service.client() as http,
    ):
        created = await http.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})
        yield Stage(service, redis, database, created.json()["key"])


async def play(stage: Stage, fault: Fault, seconds: float, clients: int) -> Round:
    """Put a load on the service, break something, mend it and wait until every kind of request is served."""
    found = Round()
    load = Load(stage, clients, found)
    await asyncio.sleep(QUIET_SECONDS)
    found.broken = time.monotonic()
    found.mended = await fault(stage, seconds)
    while not found.is_over and time.monotonic() < found.mended + RECOVERY_SECONDS:  # noqa: ASYNC110  # another process
        await asyncio.sleep(0.02)
    await asyncio.sleep(QUIET_SECONDS)
    await load.stop()
    return found
