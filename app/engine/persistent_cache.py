"""The second level of the response cache: an engine wrapper whose responses outlive the process.

Stands below `CachedEngine`, so it is consulted only for what memory does not hold, and above the output filter, so that
nothing unfiltered is stored.  Where there is no output filter, a response with personal data is not stored at all: it
could only be replayed as it was.  A store that is slow or away is a miss, never a failed request, and a filter that is
slow keeps no response waiting for its end.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Protocol

import msgspec
from msgspec import structs

from app.engine.base import Engine
from app.engine.cache import EVENTS_PER_TURN, cache_key
from app.engine.wrapper import EngineWrapper
from app.errors import AppError
from app.events import CacheStatus, Delta, Event, Finished, finish
from app.requests import GenerationRequest
from app.types import FinishReason, Tenant, Usage

MAX_RESPONSE_BYTES = 1024 * 1024
"""Longer responses are not stored."""
MASK_SECONDS = 1.0
"""How long the end of a response waits to learn whether it may be stored."""

_DECODER = msgspec.msgpack.Decoder(tuple[Event, ...])


class ResponseStore(Protocol):
    """Stores responses by the digest of everything that could change them."""

    async def get(self, key: bytes) -> bytes | None:
        """Return the stored response if it has not expired; None also where the store does not answer."""

    def put(self, key: bytes, response: bytes) -> None:
        """Store a response, without waiting for it."""


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
        mask: Mask | None = None,
    ) -> None:
        """Args:
        scope: what else decides a response, as for `CachedEngine`.
        mask: takes personal data out of a tenant's text; what it would change is not stored.  None stores everything.
        """
        super().__init__(inner)
        self._mask = mask
        self._store = store
        self._scope = scope
        self._replaying: dict[str, bool] = {}
        """Request id -> whether it has been aborted."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return self._look_up(request) if request.cache else self._inner.stream(request)

    async def _look_up(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        key = cache_key(request, self._inner.info, self._scope)
        stored = await self._read(key)
        stream = self._replay(request, stored) if stored else self._generate(request, key)
        async with aclosing(stream) as events:
            async for event in events:
                yield event

    async def _read(self, key: bytes) -> tuple[Event, ...] | None:
        response = await self._store.get(key)
        if response is None:
            return None
        try:
            return _DECODER.decode(response)
        except msgspec.DecodeError:
            return None

    async def _replay(self, request: GenerationRequest, stored: tuple[Event, ...]) -> AsyncGenerator[Event, None]:
        self._replaying[request.id] = False
        tokens = 0
        try:
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
        finally:
            del self._replaying[request.id]

    async def _generate(self, request: GenerationRequest, key: bytes) -> AsyncGenerator[Event, None]:
        generated: list[Event] = []
        async with aclosing(self._inner.stream(request)) as events:
            async for event in events:
                if not isinstance(event, Delta):
                    event = structs.replace(event, cache=CacheStatus.MISS)
                generated.append(event)
                if isinstance(event, Finished) and event.finish_reason.is_complete:
                    await self._put(request.tenant, key, generated, cut=event.samples[0].breaks_off)
                yield event

    async def _put(self, tenant: Tenant, key: bytes, events: list[Event], *, cut: bool) -> None:
        response = msgspec.msgpack.encode(events)
        if len(response) <= MAX_RESPONSE_BYTES and await self._is_clean(tenant, events, cut=cut):
            self._store.put(key, response)

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
