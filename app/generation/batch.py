"""Many asks of one request: answered together, a few at a time, each with its own fate.

Decides how much of the engine one request may take, and what becomes of an ask that finds it full.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from app.errors import EngineBusy
from app.generation.asks import CompletionAsk, Event, Reply, collect

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


class _Batch:
    """The asks of one request that are being answered now."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete
        self._running = 0
        self._end = asyncio.Event()
        """Set, and made anew, each time that one of them ends."""

    async def answer(self, ask: CompletionAsk) -> Reply | Exception:
        """Answer one.  Where the engine is full it waits for another of the batch to end, if one runs."""
        while True:
            end = self._end
            outcome = await self._try(ask)
            if not isinstance(outcome, EngineBusy) or self._running == 0:
                self._end.set()
                self._end = asyncio.Event()
                return outcome
            await end.wait()

    async def _try(self, ask: CompletionAsk) -> Reply | Exception:
        self._running += 1
        try:
            async with aclosing(self._complete(ask)) as events:
                return await collect(events)
        except Exception as error:  # noqa: BLE001  # one that fails must not take the others' answers along
            return error
        finally:
            self._running -= 1
