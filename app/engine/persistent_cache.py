"""The second level of the response cache: an engine wrapper whose responses outlive the process.

Stands below `CachedEngine`, so it is consulted only for what memory does not hold, and above the output filter, so that
nothing unfiltered is stored.  Where there is no output filter, a response with personal data is not stored at all: it
could only be replayed as it was.  A store that is slow or away is a miss, never a failed request, and a filter that is
slow keeps no response waiting for its end.

Where the store has claims, one of several processes generates a response, and the others wait for it so long and get it
as a whole.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from enum import Enum, auto
from typing import Protocol

import msgspec
from msgspec import structs

from app.engine.base import Engine
from app.engine.cache import EVENTS_PER_TURN, cache_key
from app.engine.wrapper import EngineWrapper
from app.errors import AppError
from app.events import CacheStatus, Delta, Event, Finished, Started, finish
from app.requests import GenerationRequest
from app.types import FinishReason, Tenant, Usage

MAX_RESPONSE_BYTES = 1024 * 1024
"""Longer responses are not stored."""
MASK_SECONDS = 1.0
"""How long the end of a response waits to learn whether it may be stored."""

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 0.25
"""Between two looks at what another process generates."""

_DECODER = msgspec.msgpack.Decoder(tuple[Event, ...])


class ResponseStore(Protocol):
    """Stores responses by the digest of everything that could change them."""

    async def get(self, key: bytes) -> bytes | None:
        """Return the stored response if it has not expired; None also where the store does not answer."""

    def put(self, key: bytes, response: bytes) -> None:
        """Store a response, without waiting for it."""


class Claim(Enum):
    """Who generates a response that is not stored."""

    GRANTED = auto()
    """The caller, for all others; until `put` or `give_up`."""
    TAKEN = auto()
    """Another does, or has stored it by now."""
    NONE = auto()
    """The caller, for itself only: what another generated could not be stored, or nobody can say."""


class Claims(Protocol):
    """Lets one of several processes generate a response for all of them."""

    async def claim(self, key: bytes, *, replacing: bool = False) -> Claim:
        """Claim a response that is to be generated.  Args: replacing: what is stored cannot be read."""

    def give_up(self, key: bytes, *, shared: bool) -> None:
        """End a claim without a response, and without waiting; nothing where none is held.

        Args: shared: whether another should claim it; False where nobody could store this response.
        """


class Mask(Protocol):
    """Takes personal data out of a tenant's text; `app.privacy.filters.InputFilter.mask` is one."""

    def __call__(self, tenant: Tenant, text: str, *, cut: bool = False) -> Awaitable[str]:
        """Return the text without it.  Args: cut: whether the text breaks off."""


class PersistentCacheEngine(EngineWrapper):
    """Replays responses that this or another process has generated before."""

    def __init__(
        self,
        inner: Engine,
        store: ResponseStore,
        *,
        scope: str,
        claims: Claims | None = None,
        wait_seconds: float = 30,
        mask: Mask | None = None,
        on_unreadable: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        scope: what else decides a response, as for `CachedEngine`.
        claims: of the store; None generates whatever is not stored.
        wait_seconds: how long a request waits for what another process generates, before it generates it too.
        on_unreadable: called for what is stored and is no response.
        mask: takes personal data out of a tenant's text; what it would change is not stored.  None stores everything.
        """
        super().__init__(inner)
        self._mask = mask
        self._store = store
        self._scope = scope
        self._claims = claims
        self._wait_seconds = wait_seconds
        self._on_unreadable = on_unreadable
        self._replaying: dict[str, bool] = {}
        """Request id -> whether it has been aborted."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return self._look_up(request) if request.cache else self._inner.stream(request)

    async def _look_up(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        key = cache_key(request, self._inner.info, self._scope)
        self._replaying[request.id] = False
        try:
            stored = await self._find(request, key)
            if self._replaying[request.id]:
                self._give_up(key)
                yield finish(FinishReason.ABORT, Usage(request.prompt_tokens, 0))
                return
            if stored:
                async with aclosing(self._replay(request, stored)) as events:
                    async for event in events:
                        yield event
                return
        finally:
            del self._replaying[request.id]
        async with aclosing(self._generate(request, key)) as events:
            async for event in events:
                yield event

    async def _find(self, request: GenerationRequest, key: bytes) -> tuple[Event, ...] | None:
        """Return the stored response, perhaps once another process has generated it; None if it is to be generated."""
        stored = await self._read(key)
        pause, waited = SHORTEST_PAUSE_SECONDS, 0.0
        while not stored and self._claims is not None and not self._replaying[request.id]:
            claim = await self._claims.claim(key, replacing=stored is not None)
            if claim is not Claim.TAKEN or waited >= self._wait_seconds:
                return None
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(LONGEST_PAUSE_SECONDS, pause * 1.5)
            stored = await self._read(key)
        return stored

    async def _read(self, key: bytes) -> tuple[Event, ...] | None:
        """Return what is stored; None for nothing, and no events for what is no response."""
        response = await self._store.get(key)
        if response is None:
            return None
        try:
            events = _DECODER.decode(response)
        except msgspec.DecodeError:
            events = ()
        if not _is_whole(events):
            self._on_unreadable()
            return ()
        return events

    async def _replay(self, request: GenerationRequest, stored: tuple[Event, ...]) -> AsyncGenerator[Event, None]:
        tokens = 0
        if isinstance(stored[-1], Finished):
            request.progress.prompt = stored[-1].usage.prompt_tokens
        for number, event in enumerate(stored):
            if number % EVENTS_PER_TURN == EVENTS_PER_TURN - 1:
                await asyncio.sleep(0)
            if self._replaying[request.id]:
                yield finish(FinishReason.ABORT, Usage(request.prompt_tokens, tokens))
                return
            if isinstance(event, Delta):
                tokens += event.tokens
                yield event
            else:
                yield structs.replace(event, cache=CacheStatus.HIT)

    async def _generate(self, request: GenerationRequest, key: bytes) -> AsyncGenerator[Event, None]:
        generated: list[Event] = []
        shared = True
        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    if not isinstance(event, Delta):
                        event = structs.replace(event, cache=CacheStatus.MISS)
                    generated.append(event)
                    if isinstance(event, Finished) and event.finish_reason.is_complete:
                        shared = await self._put(request.tenant, key, generated, cut=event.samples[0].breaks_off)
                    yield event
        finally:
            self._give_up(key, shared=shared)

    def _give_up(self, key: bytes, *, shared: bool = True) -> None:
        if self._claims is not None:
            self._claims.give_up(key, shared=shared)

    async def _put(self, tenant: Tenant, key: bytes, events: list[Event], *, cut: bool) -> bool:
        """Store a response; return whether it may be stored."""
        response = msgspec.msgpack.encode(events)
        storable = len(response) <= MAX_RESPONSE_BYTES and await self._is_clean(tenant, events, cut=cut)
        if storable:
            self._store.put(key, response)
        return storable

    async def _is_clean(self, tenant: Tenant, events: list[Event], *, cut: bool) -> bool:
        """Return whether masking would leave every sample as it is; False where the filter fails or is slow."""
        if self._mask is None:
            return True
        samples: defaultdict[int, list[str]] = defaultdict(list)
        prompt = b""
        for event in events:
            if isinstance(event, Delta):
                samples[event.index].append(event.all_text)
                prompt += b"".join(token.raw for token in event.prompt_logprobs)
        try:
            async with asyncio.timeout(MASK_SECONDS):
                if prompt and await self._mask(tenant, text := prompt.decode(errors="replace")) != text:
                    return False
                texts = map("".join, samples.values())
                return all([await self._mask(tenant, text, cut=cut) == text for text in texts])
        except (AppError, TimeoutError):
            return False

    async def abort(self, request_id: str) -> None:
        if request_id in self._replaying:
            self._replaying[request_id] = True
        else:
            await self._inner.abort(request_id)

    async def close(self) -> None:
        for request_id in self._replaying:
            self._replaying[request_id] = True
        await self._inner.close()


def _is_whole(events: Sequence[Event]) -> bool:
    """Return whether these are the events of one complete response."""
    if len(events) < 2 or not isinstance(events[0], Started):
        return False
    last, deltas = events[-1], events[1:-1]
    ends = isinstance(last, Finished) and bool(last.samples) and last.finish_reason.is_complete
    return ends and all(isinstance(event, Delta) for event in deltas)
