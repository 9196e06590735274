"""The response cache: an engine wrapper that gives identical requests of one tenant the same response.

Two requests are identical if everything that could change the response is equal.  Complete responses alone are stored,
as the inner engine sends them, and identical requests that run at the same time share one generation (single-flight).
Serves one event loop; the composition leaves it out where the cache is off.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from typing import Protocol
from uuid import uuid4

from cachetools import TTLCache
from msgspec import structs

from app.config import CacheConfig
from app.engine.base import Engine, EngineInfo
from app.engine.wrapper import EngineWrapper
from app.events import CacheStatus, Delta, Event, Finished, finish
from app.requests import GenerationRequest, Progress, identity
from app.types import FinishReason, Usage

MAX_BYTES = 64 * 1024 * 1024
"""Approximate size of all stored responses; the least recently used is evicted first."""

_EVENT_BYTES = 200
"""Memory of a stored event besides its text."""
_LOGPROB_BYTES = 160
_ALTERNATIVE_BYTES = 120
"""Memory of the log-probability of a token, and of an alternative in its position."""
MAX_LOGPROBS = 20_000
"""Log-probabilities, alternatives included, that a response may have to be stored or shared: megabytes."""
EVENTS_PER_TURN = 16
"""A replay lets the event loop run after this many events."""


class CacheMetrics(Protocol):
    """Counts the hits and misses of one model."""

    def cache_hit(self) -> None: ...

    def cache_miss(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot for /status."""

    hits: int
    """Responses replayed or shared."""
    misses: int
    entries: int
    size: int
    """Capacity in entries."""
    bytes: int
    """Memory of the entries, roughly."""


def cache_key(request: GenerationRequest, info: EngineInfo, scope: str) -> bytes:
    """Return a digest of everything that could change the response.

    Covers every field of the request that is not declared harmless, and every field of the engine's description.  The
    repr of the whole tuple delimits its parts, so that no two lists of parts run together into the same bytes.
    """
    described = repr((scope, _description(info), identity(request)))
    return sha256(described.encode("utf-8", "surrogatepass")).digest()


@lru_cache(maxsize=64)
def _description(info: EngineInfo) -> str:
    return repr(info)


def _is_large(request: GenerationRequest) -> bool:
    """Return whether the response may have so many log-probabilities that it is not worth its memory."""
    params = request.sampling
    own = 0 if params.logprobs is None else params.max_tokens * (1 + params.logprobs)
    prompt = 0 if params.prompt_logprobs is None else request.prompt_tokens * (1 + params.prompt_logprobs)
    return own + prompt > MAX_LOGPROBS


def _prompt_tokens(events: tuple[Event, ...]) -> int:
    """Return the length of the prompt of a complete response."""
    return events[-1].usage.prompt_tokens if isinstance(events[-1], Finished) else 0


def _weight(events: tuple[Event, ...]) -> int:
    """Return roughly how many bytes a stored response takes."""
    deltas = [event for event in events if isinstance(event, Delta)]
    alternatives = [len(token.top) for delta in deltas for token in delta.logprobs]
    alternatives += [len(token.top) for delta in deltas for token in delta.prompt_logprobs]
    return (
        sum(_EVENT_BYTES + len(delta.all_text.encode("utf-8", "surrogatepass")) for delta in deltas)
        + _LOGPROB_BYTES * len(alternatives)
        + _ALTERNATIVE_BYTES * sum(alternatives)
    )


class _Flight:
    """One response while it is generated (or replayed), and its readers; max_tokens bounds its events.

    Each generated token is charged once: to the reader that receives it first, and one that nobody has received to the
    last to leave of those who were there when it was generated.  So whoever begins a generation and stays pays for all
    of it, and whoever stays longer pays for the rest.
    """

    def __init__(self, key: bytes, events: list[Event], *, streams: bool = True) -> None:
        """Args: streams: whether deltas arrive as they are generated."""
        self.key = key
        self.events = events
        self.streams = streams
        self.readers: dict[_Reader, None] = {}
        """In the order in which they joined, which is the order in which they are woken."""
        self.progress = Progress()
        """What the inner engine generates for all readers."""
        self.charged = 0
        """How many of those tokens a reader has been charged with."""
        self.prompt_charged = False
        """Whether a reader has been charged with a prompt that was computed for its own sake."""
        self.request_id = ""
        self.task: asyncio.Task[None] | None = None
        """Generates the response, or holds the error that ended it; None for a response that is replayed."""

    @property
    def complete(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)

    @property
    def over(self) -> bool:
        """Return whether no more events will come."""
        return self.complete or self.task is None or self.task.done()

    def wake(self) -> None:
        for reader in self.readers:
            reader.updated.set()

    def charge(self, reader: "_Reader", tokens: int | None = None) -> None:
        """Charge a reader with those of the first `tokens` that are charged to nobody yet; None: with all of them.

        Nothing is charged for a response that the inner engine replays itself.
        """
        generated, progress = self.progress.generated, reader.progress
        progress.prompt = self.progress.prompt
        most = generated if tokens is None else min(tokens, generated)
        if not progress.generated and not progress.read_prompt:
            progress.shares_prompt = self.charged > 0 or self.prompt_charged
        if not progress.shares_prompt:
            progress.cached = self.progress.cached
        if self.progress.read_prompt and not self.prompt_charged:
            self.prompt_charged = progress.read_prompt = True
        if most > self.charged:
            progress.generated += most - self.charged
            self.charged = most


class _Reader:
    """The position of one request in a flight."""

    def __init__(self, flight: _Flight, request: GenerationRequest, status: CacheStatus) -> None:
        self.flight = flight
        self.updated = asyncio.Event()
        self.aborted = False
        self.progress = request.progress
        self.joined_at = flight.progress.generated
        """Tokens that had been generated before it joined."""
        self._status = status
        self._prompt_tokens = request.prompt_tokens
        self._position = 0
        self._tokens = 0

    async def next(self) -> Event:
        """Return the next event as soon as it is there.

        Raises: AppError: what ended the generation in place of Finished.
        """
        flight = self.flight
        if self._position % EVENTS_PER_TURN == EVENTS_PER_TURN - 1:
            await asyncio.sleep(0)
        while not self.aborted and self._position == len(flight.events) and not flight.over:
            self.updated.clear()
            await self.updated.wait()
        if self.aborted or self._position == len(flight.events):
            return self._cut_short()
        event = flight.events[self._position]
        self._position += 1
        if isinstance(event, Delta):
            self._tokens += event.tokens
            flight.charge(self, self._tokens)
            return event
        if isinstance(event, Finished):
            if self.joined_at > flight.charged:
                # What no delta brought is for those to pay who were there; the first reader of all has been longest.
                flight.charge(next(iter(flight.readers), self), self.joined_at)
            flight.charge(self)
            if self.progress.generated:
                return structs.replace(event, cache=CacheStatus.MISS)
        # A hit stays one: the level below may have replayed what this one had to fetch.
        status = event.cache if event.cache is CacheStatus.HIT else self._status
        return structs.replace(event, cache=status)

    def _cut_short(self) -> Finished:
        task = self.flight.task
        if not self.aborted and task is not None and not task.cancelled():
            task.result()  # raises what broke the generation
        prompt = self._prompt_tokens or self.flight.progress.prompt
        usage = Usage(prompt_tokens=prompt, completion_tokens=self._tokens)
        return finish(FinishReason.ABORT, usage)


class CachedEngine(EngineWrapper):
    """Replays stored responses delta by delta, and shares those that are being generated."""

    def __init__(
        self,
        inner: Engine,
        config: CacheConfig,
        *,
        scope: str = "",
        metrics: CacheMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        scope: what else decides a response and only the composition knows, for example the output filter's policy.
        clock: seconds; decides when a stored response expires.
        """
        super().__init__(inner)
        self._scope = scope
        self._metrics = metrics
        self._size = config.size
        self._responses: TTLCache[bytes, tuple[Event, ...]] = TTLCache(MAX_BYTES, config.ttl_seconds, clock, _weight)
        self._flights: dict[bytes, _Flight] = {}
        self._readers: dict[str, _Reader] = {}
        self._hits = self._misses = 0

    def stats(self) -> CacheStats:
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            entries=len(self._responses),
            size=self._size,
            bytes=int(self._responses.currsize),
        )

    @property
    def readers(self) -> int:
        """Return how many requests are reading a response through the cache."""
        return len(self._readers)

    @property
    def generating(self) -> int:
        """Return how many responses are being generated that identical requests may share."""
        return len(self._flights)

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return self._read(request) if request.cache and not _is_large(request) else self._inner.stream(request)

    async def _read(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        reader = self._readers[request.id] = self._join(request)
        try:
            while True:
                event = await reader.next()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            del self._readers[request.id]
            await self._leave(reader)

    async def abort(self, request_id: str) -> None:
        reader = self._readers.get(request_id)
        if reader is None:
            await self._inner.abort(request_id)  # it may be one that bypassed the cache
            return
        reader.aborted = True
        reader.updated.set()
        await self._leave(reader)

    async def close(self) -> None:
        for request_id in list(self._readers):
            await self.abort(request_id)
        await self._inner.close()
        self._responses.clear()

    def _join(self, request: GenerationRequest) -> _Reader:
        """Find the response stored or in flight, or begin to generate it; raises what `info` raises."""
        key = cache_key(request, self._inner.info, self._scope)
        flight = self._flights.get(key)
        if flight is not None and (flight.over or request.stream > flight.streams):
            flight = None
        if flight is None and (stored := self._responses.get(key)) is not None:
            flight = _Flight(key, list(stored))
            flight.progress.prompt = _prompt_tokens(stored)
        hit = flight is not None
        if flight is None:
            flight = self._flights[key] = self._begin(key, request)
        self._count(hit)
        reader = _Reader(flight, request, CacheStatus.HIT if hit else CacheStatus.MISS)
        flight.readers[reader] = None
        return reader

    def _count(self, hit: bool) -> None:
        self._hits += hit
        self._misses += not hit
        if self._metrics is not None:
            (self._metrics.cache_hit if hit else self._metrics.cache_miss)()

    def _begin(self, key: bytes, request: GenerationRequest) -> _Flight:
        flight = _Flight(key, [], streams=request.stream)
        # An id and a progress of its own: the request that began it may leave while others still read.
        flight.request_id = uuid4().hex
        flight.progress.times = request.progress.times
        request = structs.replace(request, id=flight.request_id, progress=flight.progress)
        flight.task = asyncio.create_task(self._generate(flight, request))
        flight.task.add_done_callback(partial(self._on_end, flight))
        return flight

    async def _generate(self, flight: _Flight, request: GenerationRequest) -> None:
        async with aclosing(self._inner.stream(request)) as events:
            async for event in events:
                flight.events.append(event)
                if isinstance(event, Finished) and event.finish_reason.is_complete:
                    self._store(flight)
                flight.wake()

    def _on_end(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        self._forget(flight)
        flight.wake()
        if not task.cancelled():
            task.exception()  # Retrieved even if every reader has left: asyncio would log it otherwise.

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _store(self, flight: _Flight) -> None:
        response = tuple(flight.events)
        if _weight(response) > MAX_BYTES:
            return
        self._responses[flight.key] = response
        while len(self._responses) > self._size:
            self._responses.popitem()

    async def _leave(self, reader: _Reader) -> None:
        """Remove a reader from its flight, charged with what none of the others was there for; the last one ends it."""
        flight = reader.flight
        present = reader in flight.readers
        flight.readers.pop(reader, None)
        try:
            if not flight.readers:
                await self._end(flight)
        finally:
            if present:
                flight.charge(reader, min((other.joined_at for other in flight.readers), default=None))

    async def _end(self, flight: _Flight) -> None:
        """Cancel a generation that nobody reads any more, and wait until the inner engine has freed it."""
        if flight.task is None or flight.task.done():
            return
        # A second cancel would interrupt the inner engine's clean-up.
        if not flight.complete and not flight.task.cancelling():
            self._forget(flight)
            flight.task.cancel()
            await self._inner.abort(flight.request_id)
        await asyncio.wait([flight.task])
