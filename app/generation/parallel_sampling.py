"""The answers to one ask: made at once, read as one stream of events, and ended together.

Decides when an ask counts as begun and what one lost answer means for the others.  Knows no prompt and no chain.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from app.engine.base import Chunk, Engine
from app.engine.tokenizer.logprob_text import spell
from app.generation.request_stats import Meter
from app.generation.requests import Delta, Event, Started
from app.types import FinishReason, TokenLogprob

T = TypeVar("T")


class Answers:
    """Turns the texts of several generations into the events of one ask."""

    def __init__(self, ids: Sequence[str], engine: Engine, meter: Meter) -> None:
        """Args: ids: the engine's, one for each answer."""
        self._ids = ids
        self._engine = engine
        self._meter = meter
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in ids]
        """Of each answer, those that no event has told yet."""
        self._made = [0] * len(ids)
        """Tokens of each answer that no event has told yet."""
        self._opened: list[AsyncGenerator[Chunk, None]] = []

    def opened(self, stream: AsyncGenerator[Chunk, None]) -> None:
        """Take charge of an engine's stream; `events` closes it."""
        self._opened.append(stream)

    def see(self, index: int, chunk: Chunk) -> None:
        """Take in what a chain cannot hand on: it comes just before the chunk's text."""
        self._meter.see(index, chunk)
        self._logprobs[index].extend(chunk.logprobs)
        self._made[index] += chunk.tokens

    async def events(self, started: Started, texts: Sequence[AsyncGenerator[str, None]]) -> AsyncGenerator[Event, None]:
        """Yield what the chains say; the first text of each, an empty one, says that the engine took it.

        Raises: AppError: one of them was refused or failed; the others are closed.
        """
        streams = [self._deltas(index, each) for index, each in enumerate(texts)]
        try:
            async with aclosing(together(streams)) as deltas, aclosing(self._begin(started, deltas)) as events:
                async for event in events:
                    yield event
        finally:
            for stream in self._opened:
                await stream.aclose()

    async def _begin(self, started: Started, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Event, None]:
        """Put Started in front as soon as every answer is admitted; what comes before that waits."""
        admitted: set[int] = set()
        early: list[Delta] = []
        async for delta in deltas:
            if _tells(delta):
                early.append(delta)
            if delta.index not in admitted:
                admitted.add(delta.index)
                if len(admitted) == len(self._ids):
                    yield replace(started, cached=self._meter.cached)
            if len(admitted) == len(self._ids):
                for each in early:
                    yield each
                early.clear()
            await self._end_with(delta.index)

    async def _deltas(self, index: int, texts: AsyncGenerator[str, None]) -> AsyncGenerator[Delta, None]:
        """Put each text together with the tokens that were seen just before it."""
        async with aclosing(texts):
            async for text in texts:
                logprobs, self._logprobs[index] = self._logprobs[index], []
                tokens = spell(logprobs, self._engine.tokenizer) if logprobs else ()
                delta = Delta(text=text, index=index, tokens=tokens, made=self._made[index])
                if _tells(delta):
                    self._made[index] = 0
                yield delta

    async def _end_with(self, index: int) -> None:
        """End all answers if this one was ended from outside: the ask has one fate."""
        if len(self._ids) > 1 and self._meter.last[index].finish_reason is FinishReason.ABORT:
            for request_id in self._ids:
                await self._engine.abort(request_id)


def _tells(delta: Delta) -> bool:
    """Whether it says anything; while an answer is held back, there are some that do not."""
    return bool(delta.text or delta.tokens)


async def together(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Read several streams at once and yield what they say as it comes.

    Each is read in a task of its own, since a stream must not change its task; what waits here is bounded by
    max_tokens.  However this ends, all are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    inbox: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                inbox.put_nowait(item)

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    for reader in readers:
        reader.add_done_callback(inbox.put_nowait)
    try:
        reading = len(readers)
        while reading:
            said = await inbox.get()
            if not isinstance(said, asyncio.Task):
                yield said
                continue
            said.result()  # raises what ended its stream
            reading -= 1
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
