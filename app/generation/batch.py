"""Many asks of one request: answered together, a few at a time, each with its own fate.

Decides how much of the engine one request may take, and what becomes of an ask that finds it full.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from app.errors import EngineBusy
from app.generation.parallel_sampling import together
from app.generation.requests import CompletionAsk, Delta, Event, Finished, Reply, Started, collect
from app.types import Usage

AT_ONCE = 16
"""Answers in the making; more would fill the waiting line that all callers share."""

Complete = Callable[[CompletionAsk], AsyncGenerator[Event, None]]


async def answer_each(complete: Complete, asks: Sequence[CompletionAsk]) -> list[Reply | Exception]:
    """Return for each ask its reply, or what went wrong with it, be it a defect; being cancelled cancels them all.

    Args: complete: the service's way from an ask to its events.
    """
    answers = max((ask.sampling.n for ask in asks), default=1)
    places = asyncio.Semaphore(max(1, AT_ONCE // answers))
    batch = _Batch(complete)

    async def in_turn(ask: CompletionAsk) -> Reply | Exception:
        async with places:
            return await batch.answer(ask)

    return await asyncio.gather(*map(in_turn, asks))


async def answer_as_one(complete: Complete, asks: Sequence[CompletionAsk]) -> AsyncGenerator[Event, None]:
    """Answer several prompts as if they were one ask: the answers to each follow those to the one before.

    Args: asks: at least one; all want the same number of answers.
    Raises: AppError: one of them was refused or failed; the others are closed.
    """
    answers = asks[0].sampling.n
    places = asyncio.Semaphore(max(1, AT_ONCE // answers))
    batch = _Batch(complete)
    finished: dict[int, Finished] = {}

    async def in_turn(number: int) -> AsyncGenerator[Event, None]:
        async with places, aclosing(batch.events(asks[number])) as events:
            async for event in events:
                match event:
                    case Started():
                        # Of several prompts it is not known yet, so they count as made anew.
                        cached = event.cached and len(asks) == 1
                        yield replace(event, index=number * answers, cached=cached)
                    case Delta():
                        yield replace(event, index=event.index + number * answers)
                    case Finished():
                        finished[number] = event

    async with aclosing(together([in_turn(number) for number in range(len(asks))])) as events:
        async for event in events:
            yield event
    yield _sum([finished[number] for number in range(len(asks))])


def _sum(parts: Sequence[Finished]) -> Finished:
    usages = [part.usage for part in parts]
    return replace(
        parts[0],
        endings=tuple(ending for part in parts for ending in part.endings),
        usage=Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        ),
        cached=all(part.cached for part in parts),
    )


class _Batch:
    """The asks of one request that are being answered now."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete
        self._running = 0
        self._end = asyncio.Event()
        """Set, and made anew, each time that one of them ends."""

    async def answer(self, ask: CompletionAsk) -> Reply | Exception:
        """Answer one, or return what went wrong with it."""
        try:
            async with aclosing(self.events(ask)) as events:
                return await collect(events)
        except Exception as error:  # noqa: BLE001  # one that fails must not take the others' answers along
            return error

    async def events(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        """Answer one.  Where the engine is full it waits for another of the batch to end, if one runs."""
        while True:
            end, waits = self._end, False
            self._running += 1
            try:
                async with aclosing(self._complete(ask)) as events:
                    async for event in events:
                        yield event
                return
            except EngineBusy:  # comes before the first event or not at all
                waits = self._running > 1
                if not waits:
                    raise
            finally:
                self._running -= 1
                if not waits:
                    self._end.set()
                    self._end = asyncio.Event()
            await end.wait()
