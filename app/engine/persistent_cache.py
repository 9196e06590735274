"""The second level of the response cache: an Engine around an Engine that keeps answers where they outlive the process.

Stands below `CachedEngine`, so it is asked only for what the memory does not have, and above the output filter, so
nothing unfiltered is kept.  A store that is slow or away is a miss, never a failed request.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

import msgspec

from app.engine.base import Chunk, Engine, GenerationRequest
from app.engine.cache import cache_key
from app.engine.wrapper import EngineWrapper
from app.types import FinishReason, Usage

MAX_ANSWER_BYTES = 1024 * 1024
"""Longer answers are not kept."""

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
_BREATH = 16
"""A replay lets the event loop run after this many chunks."""


class AnswerStore(Protocol):
    """Keeps answers by the digest of everything that could change them."""

    async def get(self, key: bytes) -> bytes | None:
        """Return what is kept and not too old; None also where the store does not answer."""

    def put(self, key: bytes, answer: bytes) -> None:
        """Keep an answer, without waiting for it."""


class StoredEngine(EngineWrapper):
    """Replays answers that this or another process has made before."""

    def __init__(self, inner: Engine, store: AnswerStore, *, scope: str) -> None:
        """Args: scope: what else decides an answer, as for `CachedEngine`."""
        super().__init__(inner)
        self._store = store
        self._scope = scope
        self._replaying: dict[str, bool] = {}
        """Request id -> whether it has been aborted."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        key = cache_key(request, self._inner.info, self._scope) if request.cache else None
        stored = await self._read(key) if key is not None else None
        chunks = self._replay(request, stored) if stored else self._make(request, key)
        async with aclosing(chunks) as each:
            async for chunk in each:
                yield chunk

    async def _read(self, key: bytes) -> tuple[Chunk, ...] | None:
        answer = await self._store.get(key)
        if answer is None:
            return None
        try:
            return msgspec.msgpack.decode(answer, type=tuple[Chunk, ...])
        except msgspec.DecodeError:
            return None

    async def _replay(self, request: GenerationRequest, chunks: tuple[Chunk, ...]) -> AsyncGenerator[Chunk, None]:
        self._replaying[request.id] = False
        tokens = 0
        try:
            for number, chunk in enumerate(chunks):
                if number % _BREATH == _BREATH - 1:
                    await asyncio.sleep(0)
                if self._replaying[request.id]:
                    usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=tokens)
                    yield Chunk(finish_reason=FinishReason.ABORT, usage=usage)
                    return
                tokens += chunk.tokens
                yield replace(chunk, cached=True)
        finally:
            del self._replaying[request.id]

    async def _make(self, request: GenerationRequest, key: bytes | None) -> AsyncGenerator[Chunk, None]:
        made: list[Chunk] = []
        async with aclosing(self._inner.stream(request)) as chunks:
            async for chunk in chunks:
                made.append(chunk)
                if key is not None and chunk.finish_reason in _COMPLETE:
                    self._keep(key, made)
                yield chunk

    def _keep(self, key: bytes, chunks: list[Chunk]) -> None:
        answer = msgspec.msgpack.encode(chunks)
        if len(answer) <= MAX_ANSWER_BYTES:
            self._store.put(key, answer)

    async def abort(self, request_id: str) -> None:
        if request_id in self._replaying:
            self._replaying[request_id] = True
        else:
            await self._inner.abort(request_id)

    async def close(self) -> None:
        for request_id in self._replaying:
            self._replaying[request_id] = True
        await self._inner.close()
