"""Merges the streams of parallel samples into one stream of events."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from msgspec import structs

from app.events import CacheStatus, Delta, Event, Finished, Started
from app.types import Usage

T = TypeVar("T")


def merge_samples(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Return the events of several samples of one prompt as those of one request.

    Started comes once all samples are admitted, Finished once all have finished.

    Raises: AppError: one of them was refused or failed; the others are closed.
    """
    return streams[0] if len(streams) == 1 else _merge_samples(streams)


async def _merge_samples(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    started: dict[int, Started] = {}
    finished: dict[int, Finished] = {}
    early: list[Delta] = []
    async with aclosing(merge_streams([_indexed(index, each) for index, each in enumerate(streams)])) as merged:
        async for index, event in merged:
            match event:
                case Delta() if len(started) < len(streams):
                    early.append(event)
                case Delta():
                    yield event
                case Started():
                    started[index] = event
                    if len(started) == len(streams):
                        yield structs.replace(event, cache=overall(list(started.values())))
                        for each in early:
                            yield each
                case Finished():
                    finished[index] = event
    yield _combined([finished[index] for index in range(len(streams))])


async def _indexed(index: int, stream: AsyncGenerator[Event, None]) -> AsyncGenerator[tuple[int, Event], None]:
    async with aclosing(stream) as events:
        async for event in events:
            yield index, structs.replace(event, index=index) if isinstance(event, Delta) else event


def _combined(parts: Sequence[Finished]) -> Finished:
    """Return the end of several samples that share one prompt."""
    first = parts[0].usage
    samples = tuple(sample for part in parts for sample in part.samples)
    completion_tokens = sum(sample.completion_tokens for sample in samples)
    usage = Usage(first.prompt_tokens, completion_tokens, first.cached_tokens)
    return structs.replace(parts[0], samples=samples, usage=usage, cache=overall(parts))


def overall(parts: Sequence[Started | Finished]) -> CacheStatus:
    """Return the cache status of a whole: a hit only if nothing at all is generated."""
    statuses = {part.cache for part in parts}
    return statuses.pop() if len(statuses) == 1 else CacheStatus.MISS


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Read several streams at once and yield their items as they come.

    Each is read in a task of its own, since a stream must not change its task; the queue is bounded by max_tokens.
    However this ends, all are closed.
    """
    queue: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()

    async def read(stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    for reader in readers:
        reader.add_done_callback(queue.put_nowait)
    try:
        reading = len(readers)
        while reading:
            item = await queue.get()
            if not isinstance(item, asyncio.Task):
                yield item
                continue
            item.result()  # raises what ended its stream
            reading -= 1
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
