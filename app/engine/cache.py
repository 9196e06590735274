"""The response cache: an Engine around an Engine that gives an identical request of the same tenant the same answer.

Decides what makes two requests identical (everything that could change the answer) and what is kept (complete answers
only), and lets identical requests that meet share one generation.  Knows nothing of how text is made or filtered:
whatever the inner engine lets out is what is stored.  For one event loop; the composition leaves it out where the cache
is off.
"""

import asyncio
import time
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import sha256
from typing import Protocol
from uuid import uuid4

from cachetools import TTLCache

from app.config import CacheConfig
from app.engine.base import Chunk, Engine, EngineInfo, GenerationRequest
from app.engine.wrapper import EngineWrapper
from app.types import FinishReason, Usage

MAX_BYTES = 64 * 1024 * 1024
"""Stored answers together, roughly; the least recently used goes first."""

_CHUNK_BYTES = 200
"""What a stored chunk costs besides its text."""
_LOGPROB_BYTES = 160
_ALTERNATIVE_BYTES = 120
"""What the log-probability of a token costs, and that of another in its place."""
_STORED = (FinishReason.STOP, FinishReason.LENGTH)
_BREATH = 16
"""A replay lets the event loop run after this many chunks."""


class CacheMetrics(Protocol):
    """Where hits and misses are counted."""

    def cache_hit(self) -> None: ...

    def cache_miss(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot for /status."""

    hits: int
    """Answers replayed or shared."""
    misses: int
    entries: int
    size: int
    """Entries that there is room for."""
    bytes: int
    """Roughly what the entries take."""


def cache_key(request: GenerationRequest, info: EngineInfo, scope: str) -> bytes:
    """Return a digest of everything that could change the answer.

    Each part has its length in front, so that no two lists of parts run together into the same bytes.
    """
    parts = [request.tenant, scope]
    # All fields: one that is added later cannot be forgotten here.
    parts += [repr(getattr(each, field.name)) for each in (info, request.params) for field in fields(each)]
    digest = sha256()
    for part in (*(part.encode("utf-8", "surrogatepass") for part in parts), array("q", request.prompt_ids).tobytes()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _weigh(chunks: tuple[Chunk, ...]) -> int:
    scored = [token for chunk in chunks for token in chunk.logprobs]
    return (
        sum(_CHUNK_BYTES + len(chunk.text.encode("utf-8", "surrogatepass")) for chunk in chunks)
        + _LOGPROB_BYTES * len(scored)
        + _ALTERNATIVE_BYTES * sum(len(token.top) for token in scored)
    )


class _Flight:
    """One answer as it is made (or was made) and those who read it; max_tokens bounds its chunks."""

    def __init__(self, key: bytes, chunks: list[Chunk]) -> None:
        self.key = key
        self.chunks = chunks
        self.readers: set[_Reader] = set()
        self.request_id = ""
        self.task: asyncio.Task[None] | None = None
        """Makes the answer, or holds the error that ended it; None for an answer that is replayed."""

    @property
    def complete(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None

    @property
    def over(self) -> bool:
        """Whether no more chunks will come."""
        return self.complete or self.task is None or self.task.done()

    def wake(self) -> None:
        for reader in self.readers:
            reader.news.set()


class _Reader:
    """One request's own place in a flight."""

    def __init__(self, flight: _Flight, request: GenerationRequest, *, cached: bool) -> None:
        self.flight = flight
        self.news = asyncio.Event()
        self.aborted = False
        self._cached = cached
        self._prompt_tokens = len(request.prompt_ids)
        self._at = 0
        self._tokens = 0

    async def next(self) -> Chunk:
        """Return the next chunk as soon as it is there.

        Raises: AppError: what ended the generation in place of a last chunk.
        """
        flight = self.flight
        if self._at % _BREATH == _BREATH - 1:
            await asyncio.sleep(0)
        while not self.aborted and self._at == len(flight.chunks) and not flight.over:
            self.news.clear()
            await self.news.wait()
        if self.aborted or self._at == len(flight.chunks):
            return self._cut_short()
        chunk = flight.chunks[self._at]
        self._at += 1
        self._tokens += chunk.tokens
        return replace(chunk, cached=True) if self._cached else chunk

    def _cut_short(self) -> Chunk:
        task = self.flight.task
        if not self.aborted and task is not None and not task.cancelled():
            task.result()  # raises what broke the generation
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._tokens)
        return Chunk(finish_reason=FinishReason.ABORT, usage=usage)


class CachedEngine(EngineWrapper):
    """Replays stored answers in the pieces they came in, and follows those that are being made."""

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
        scope: what else decides an answer and only the composition knows, for example the output filter's policy.
        clock: seconds; tells when a stored answer is too old.
        """
        super().__init__(inner)
        self._scope = scope
        self._metrics = metrics
        self._size = config.size
        self._answers: TTLCache[bytes, tuple[Chunk, ...]] = TTLCache(MAX_BYTES, config.ttl_seconds, clock, _weigh)
        self._flights: dict[bytes, _Flight] = {}
        self._readers: dict[str, _Reader] = {}
        self._hits = self._misses = 0

    def stats(self) -> CacheStats:
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            entries=len(self._answers),
            size=self._size,
            bytes=int(self._answers.currsize),
        )

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if not request.cache:
            async with aclosing(self._inner.stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        reader = self._readers[request.id] = self._board(request)
        try:
            while True:
                chunk = await reader.next()
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            del self._readers[request.id]
            await self._leave(reader)

    async def abort(self, request_id: str) -> None:
        reader = self._readers.get(request_id)
        if reader is None:
            await self._inner.abort(request_id)  # it may be one that went past the cache
            return
        reader.aborted = True
        reader.news.set()
        await self._leave(reader)

    async def close(self) -> None:
        for request_id in list(self._readers):
            await self.abort(request_id)
        await self._inner.close()
        self._answers.clear()

    def _board(self, request: GenerationRequest) -> _Reader:
        """Find the answer stored or in the making, or begin to make it; raises what `info` raises."""
        key = cache_key(request, self._inner.info, self._scope)
        flight = self._flights.get(key)
        if flight is not None and flight.over:
            flight = None
        if flight is None and (stored := self._answers.get(key)) is not None:
            flight = _Flight(key, list(stored))
        hit = flight is not None
        if flight is None:
            flight = self._flights[key] = self._take_off(key, request)
        self._count(hit)
        reader = _Reader(flight, request, cached=hit)
        flight.readers.add(reader)
        return reader

    def _count(self, hit: bool) -> None:
        self._hits += hit
        self._misses += not hit
        if self._metrics is not None:
            (self._metrics.cache_hit if hit else self._metrics.cache_miss)()

    def _take_off(self, key: bytes, request: GenerationRequest) -> _Flight:
        flight = _Flight(key, [])
        # An id of its own: the request that began it may leave while others still read.
        flight.request_id = uuid4().hex
        flight.task = asyncio.create_task(self._fly(flight, replace(request, id=flight.request_id)))
        flight.task.add_done_callback(partial(self._land, flight))
        return flight

    async def _fly(self, flight: _Flight, request: GenerationRequest) -> None:
        async with aclosing(self._inner.stream(request)) as chunks:
            async for chunk in chunks:
                flight.chunks.append(chunk)
                if chunk.finish_reason in _STORED:
                    self._store(flight)
                flight.wake()

    def _land(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        self._forget(flight)
        flight.wake()
        if not task.cancelled():
            task.exception()  # Seen, even if every reader has left: asyncio would complain otherwise.

    def _forget(self, flight: _Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _store(self, flight: _Flight) -> None:
        answer = tuple(flight.chunks)
        if _weigh(answer) > MAX_BYTES:
            return
        self._answers[flight.key] = answer
        while len(self._answers) > self._size:
            self._answers.popitem()

    async def _leave(self, reader: _Reader) -> None:
        """Take a reader off its flight; the last one ends it, and waits until the inner engine has let go of it."""
        flight = reader.flight
        flight.readers.discard(reader)
        if flight.readers or flight.task is None or flight.task.done():
            return
        # A second cancel would break into the inner engine's clearing up.
        if not flight.complete and not flight.task.cancelling():
            self._forget(flight)
            flight.task.cancel()
            await self._inner.abort(flight.request_id)
        await asyncio.wait([flight.task])
