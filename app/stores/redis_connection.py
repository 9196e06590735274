"""The one way to Redis: bounds every wait, knows when Redis is away, and finds out when it is back.

The stores of this package are its callers.  What an outage means for a request is theirs to say: every one of them gets
`StoreUnavailable`, at once while Redis is known to be away.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import structlog
from redis import exceptions

from app.access.circuit_breaker import CircuitBreaker
from app.access.faults import Fault
from app.config.redis import RedisConfig
from app.errors import StoreUnavailable
from app.stores.redis_queue import CommandQueue, Word
from app.stores.redis_url import Client, make_client, parse_redis_url

LATE_SECONDS = 0.02
"""A timer that is later says that this process was busy, and not that Redis was."""
_PROBE_LIVES_SECONDS = 60
_CONNECTIONS = 4
"""For the queue, and for the probe."""
_FAULTS: tuple[tuple[type[Exception], Fault], ...] = (
    (exceptions.AuthenticationError, Fault.REFUSED),
    (exceptions.AuthorizationError, Fault.REFUSED),
    (exceptions.NoPermissionError, Fault.REFUSED),
    (exceptions.OutOfMemoryError, Fault.NO_MEMORY),
    (exceptions.ReadOnlyError, Fault.READ_ONLY),
    (exceptions.ConnectionError, Fault.UNREACHABLE),
    (exceptions.TimeoutError, Fault.UNREACHABLE),
    (exceptions.ClusterError, Fault.UNREACHABLE),
    (exceptions.RedisClusterException, Fault.UNREACHABLE),
    (OSError, Fault.UNREACHABLE),  # the built-in TimeoutError is one
)
_REFUSALS = frozenset(["BUSY", "LOADING", "MISCONF", "NOREPLICAS", "TRYAGAIN"])
"""First words of errors with which a server refuses whatever is asked."""

log = structlog.get_logger("llm_service")

T = TypeVar("T")


@dataclass(frozen=True)
class Script:
    """A Lua script: one atomic step of the server."""

    source: str

    @cached_property
    def digest(self) -> str:
        """The name under which a server knows it."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


class RedisConnection:
    """Redis as the stores of one process see it; connects when it is first used."""

    def __init__(self, config: RedisConfig) -> None:
        """Raises: ConfigError: the URL is missing, or none that Redis has."""
        self._config = config
        self._url = parse_redis_url(config.url.get_secret_value() if config.url else "")
        self._timeout = config.timeout_seconds
        self._queue = CommandQueue(self._send)
        self._scripts: dict[str, Script] = {}
        """By their digests."""
        self._opened: Client | None = None
        self.breaker = CircuitBreaker(self._probe, store="Redis", probe_seconds=config.probe_seconds)

    @property
    def where(self) -> str:
        """Where Redis is, without user and password."""
        return self._url.where

    @property
    def fault(self) -> Fault | None:
        """What is wrong with it; None while it answers."""
        return self.breaker.fault

    def key(self, kind: str, owner: str) -> str:
        """Return the name of a key; in a cluster all keys of one owner are on one server.

        Args:
        kind: what it holds.
        owner: a key's id or the like; never a secret.
        """
        return f"{self._config.key_prefix}:{kind}:{{{owner}}}"

    async def execute(self, *words: Word) -> Any:
        """Send one command, which must not be one that blocks, and return its reply.

        It is sent even if the caller is cancelled while it waits, and after all that were sent before it.

        Raises: StoreUnavailable: Redis is away, or does not reply in time; it may have done it all the same.
        """
        if self.breaker.open:
            raise self.unavailable()
        try:
            return await self._queue.submit(words)
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
            self._fail(error)

    async def evaluate(self, script: Script, keys: Sequence[str], args: Sequence[Word] = ()) -> Any:
        """Run a script and return what it returns; a server that does not know it yet is told.

        Args: keys: all of one owner.
        Raises: StoreUnavailable: as for `execute`.
        """
        return await self.execute(*self._call(script, keys, args))

    def post(self, script: Script, keys: Sequence[str], args: Sequence[Word] = ()) -> None:
        """Run a script before whatever is sent next, and wait for nothing; while Redis is away it is not run."""
        self.post_command(*self._call(script, keys, args))

    def post_command(self, *words: Word) -> None:
        """Send one command before whatever is sent next, and wait for nothing; while Redis is away it is not sent."""
        if not self.breaker.open:
            self._queue.submit(words).add_done_callback(self._note)

    def _note(self, reply: asyncio.Future[Any]) -> None:
        if not reply.cancelled() and (error := reply.exception()) is not None:
            with suppress(StoreUnavailable):
                self._fail(error)

    def _call(self, script: Script, keys: Sequence[str], args: Sequence[Word]) -> tuple[Word, ...]:
        self._scripts[script.digest] = script
        return ("EVALSHA", script.digest, len(keys), *keys, *args)

    def unavailable(self) -> StoreUnavailable:
        """Return the error of who does not even try while Redis is away."""
        return StoreUnavailable(self.breaker.fault or Fault.UNREACHABLE, store="Redis")

    async def open(self) -> None:
        """Find out whether Redis answers; that it does not is no reason not to start."""
        try:
            await self._probe()
        except StoreUnavailable:
            log.warning("the service starts without Redis", where=self.where, fault=self.fault)

    async def watch(self) -> None:
        """Try to reach Redis again and again while it is away; runs until it is cancelled."""
        await self.breaker.watch()

    async def close(self) -> None:
        """Wait for the replies that are to come, and close all connections."""
        await self._queue.close()
        client, self._opened = self._opened, None
        if client is not None:
            await client.aclose()
            sentinels = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
            if sentinels is not None:
                await sentinels.aclose()

    @property
    def _client(self) -> Client:
        if self._opened is None:
            self._opened = make_client(self._url, self._config, max_connections=_CONNECTIONS)
        return self._opened

    async def _send(self, commands: Sequence[Sequence[Word]]) -> Sequence[Any]:
        """Raises: what redis-py raises; TimeoutError."""
        if self.breaker.open:  # those before it have found that out
            raise TimeoutError
        return await _within(self._timeout, self._exchange(commands))

    async def _exchange(self, commands: Sequence[Sequence[Word]]) -> Sequence[Any]:
        replies = await self._replies(commands)
        unknown = [number for number, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
        if unknown:
            whole = [("EVAL", self._scripts[str(commands[each][1])].source, *commands[each][2:]) for each in unknown]
            for number, reply in zip(unknown, await self._replies(whole), strict=True):
                replies[number] = reply
        return replies

    async def _replies(self, commands: Sequence[Sequence[Word]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for words in commands:
            pipeline.execute_command(*words)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def _probe(self) -> None:
        # It writes: a server that only follows another, or has no memory left, answers everything else.
        setting = self._replies([("SET", self.key("probe", "probe"), 1, "EX", _PROBE_LIVES_SECONDS)])
        try:
            (reply,) = await _within(self._timeout, setting)
            if isinstance(reply, Exception):
                raise reply
        except (exceptions.RedisError, exceptions.RedisClusterException, OSError) as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Report an error to the breaker.  Raises: StoreUnavailable."""
        word = str(error).partition(" ")[0]
        away = Fault.UNREACHABLE if word in _REFUSALS else None
        fault = next((fault for kind, fault in _FAULTS if isinstance(error, kind)), away)
        if fault is not None:
            self.breaker.trip(fault)
            raise self.unavailable() from error
        # It works, and refuses this: a key of another kind stands there, or a script has a mistake.
        log.error("Redis refuses a command", error=word if word.isalpha() else type(error).__name__)
        raise StoreUnavailable("refuses a command", store="Redis") from error


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return what comes of some work that takes no longer.

    Raises: TimeoutError: it is not over; whatever becomes of it, nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    task.add_done_callback(_retrieve)
    due = loop.time() + seconds
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done and (late := loop.time() - due) > LATE_SECONDS:
            # The answer may be there, and nobody has read it.
            done, _ = await asyncio.wait([task], timeout=min(late, seconds))
    finally:
        task.cancel()
    if not done:
        raise TimeoutError
    return task.result()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Look at how a task ended, so that asyncio does not log an error for which nobody waits."""
    if not task.cancelled():
        task.exception()
