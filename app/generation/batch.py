"""Many prompts of one HTTP request: generated concurrently, a few at a time, each with its own outcome."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

from msgspec import structs

from app.errors import EngineBusy
from app.events import CacheStatus, Delta, Event, Finished, Response, Started, collect
from app.generation.parallel_sampling import merge_streams, overall
from app.requests import GenerationRequest
from app.types import Usage

MAX_PARALLEL = 16
"""Samples generated at once; more would fill the queue that all callers share."""
WAIT_SECONDS = 30.0
"""How long a batch that the engine has begun waits for a place for the rest of it, when none of it runs."""

Generate = Callable[[GenerationRequest], AsyncGenerator[Event, None]]


async def generate_each(generate: Generate, requests: Sequence[GenerationRequest]) -> list[Response | Exception]:
    """Return for each request its response, or what went wrong with it, be it a defect; cancelling cancels them all."""
    samples = max((request.n for request in requests), default=1)
    places = asyncio.Semaphore(max(1, MAX_PARALLEL // samples))
    batch = _Batch(generate)

    async def in_turn(request: GenerationRequest) -> Response | Exception:
        async with places:
            return await batch.respond(request)

    return await asyncio.gather(*map(in_turn, requests))


async def generate_as_one(generate: Generate, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Event, None]:
    """Yield the events of several prompts as those of one request; samples are numbered prompt by prompt.

    Args: requests: at least one; all have the same number of samples.
    Raises: AppError: one of them was refused or failed; the others are closed.
    """
    if len(requests) == 1:
        async with aclosing(generate(requests[0])) as events:
            async for event in events:
                yield event
        return
    samples = requests[0].n
    places = asyncio.Semaphore(max(1, MAX_PARALLEL // samples))
    batch = _Batch(generate)
    finished: dict[int, Finished] = {}

    async def in_turn(number: int) -> AsyncGenerator[Event, None]:
        async with places, aclosing(batch.events(requests[number])) as events:
            async for event in events:
                match event:
                    case Started():
                        # Of several prompts it is not known yet whether all are hits.
                        status = CacheStatus.MISS if event.cache is CacheStatus.HIT else event.cache
                        yield structs.replace(event, index=number * samples, cache=status)
                    case Delta():
                        yield structs.replace(event, index=event.index + number * samples)
                    case Finished():
                        finished[number] = event

    async with aclosing(merge_streams([in_turn(number) for number in range(len(requests))])) as events:
        async for event in events:
            yield event
    yield _sum([finished[number] for number in range(len(requests))])


def _sum(parts: Sequence[Finished]) -> Finished:
    usages = [part.usage for part in parts]
    return structs.replace(
        parts[0],
        samples=tuple(sample for part in parts for sample in part.samples),
        usage=Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
        ),
        cache=overall(parts),
    )


class _Batch:
    """The requests of one batch that are running now."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self._running = 0
        self._begun = False
        """Whether the engine has taken one of them."""
        self._refusal: EngineBusy | None = None
        """Why the engine takes none of them."""
        self._end = asyncio.Event()
        """Set, and replaced, each time that one of them ends."""

    async def respond(self, request: GenerationRequest) -> Response | Exception:
        """Run one, or return what went wrong with it."""
        try:
            async with aclosing(self.events(request)) as events:
                return await collect(events)
        except Exception as error:  # noqa: BLE001  # one that fails must not take the others along
            return error

    async def events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Run one.

        Where the engine is full it waits for another of the batch to end, or a while if none runs.  A batch of which
        the engine has taken nothing is refused as a whole, without trying the rest.  Neither leaves a row in the
        inference log of what the engine refused.
        """
        request = structs.replace(request, origin=replace(request.origin, retried=True))
        until = asyncio.get_running_loop().time() + WAIT_SECONDS
        while True:
            if self._refusal is not None:
                raise self._refusal
            end, waits = self._end, False
            self._running += 1
            try:
                async with aclosing(self._generate(request)) as events:
                    async for event in events:
                        self._begun = True
                        yield event
                return
            except EngineBusy as error:  # comes before the first event or not at all
                waits = self._waits(error, until)
                if not waits:
                    raise
                retry_after = error.retry_after
            finally:
                self._running -= 1
                if not waits:
                    self._end.set()
                    self._end = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._running else retry_after):
                    await end.wait()

    def _waits(self, error: EngineBusy, until: float) -> bool:
        """Return whether a request that was refused is to be tried again."""
        if self._running > 1:
            return True
        if not self._begun:
            self._refusal = error
        return self._begun and asyncio.get_running_loop().time() < until
