"""Many asks of one request: bounded, each with its own fate, cancelled together."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from app.errors import AppError, EngineBusy, InvalidRequest
from app.generation.batch import AT_ONCE, answer_as_one, answer_each
from app.generation.requests import CompletionAsk, Delta, Ending, Event, Finished, Reply, Sampling, Started, collect
from app.types import FinishReason, Principal, Usage


class Places:
    """A service with so many places; an ask takes as many as it wants answers, and gives its prompt back."""

    def __init__(self, places: int = 1000) -> None:
        self.places = places
        self.taken = self.most = self.begun = 0
        self.go = asyncio.Event()
        self.go.set()

    async def complete(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        answers = ask.sampling.n
        await asyncio.sleep(0)
        if self.taken + answers > self.places:
            raise EngineBusy("Full.")
        self.begun += 1
        self.taken += answers
        self.most = max(self.most, self.taken)
        try:
            yield Started(model="m", prompt=ask.prompt)
            await self.go.wait()
            for _ in range(3):
                await asyncio.sleep(0)
            if ask.prompt == "wrong":
                raise InvalidRequest("This prompt is wrong.")
            if ask.prompt == "defect":
                raise RuntimeError("defect")
            yield Delta(text=ask.prompt)
            endings = (Ending(finish_reason=FinishReason.STOP, tokens=1),) * answers
            yield Finished(model="m", endings=endings, usage=Usage(1, 1), cached=False)
        finally:
            self.taken -= answers


def asks(*prompts: str, n: int = 1) -> list[CompletionAsk]:
    caller = Principal("a", "anna")
    return [
        CompletionAsk(id=f"r-{number}", caller=caller, prompt=prompt, sampling=Sampling(n=n))
        for number, prompt in enumerate(prompts)
    ]


def told(outcomes: list[Reply | Exception]) -> list[str]:
    return [outcome.text if isinstance(outcome, Reply) else type(outcome).__name__ for outcome in outcomes]


@pytest.mark.parametrize(("n", "most"), [(1, AT_ONCE), (3, AT_ONCE // 3 * 3), (8, AT_ONCE)])
async def test_answers_come_in_the_order_of_the_asks_and_only_so_many_are_in_the_making(n: int, most: int):
    """However many answers each asks for, one request takes a bounded part of the engine."""
    service = Places()
    prompts = [f"p{number}" for number in range(40)]

    outcomes = await answer_each(service.complete, asks(*prompts, n=n))

    assert prompts == told(outcomes)
    assert most == service.most
    assert 0 == service.taken


async def test_what_goes_wrong_with_one_stands_in_its_place():
    """A refusal, or a defect of ours, and all others have their answers."""
    outcomes = await answer_each(Places().complete, asks("a", "wrong", "b", "defect", "c"))

    assert ["a", "InvalidRequest", "b", "RuntimeError", "c"] == told(outcomes)


@pytest.mark.parametrize("places", [1, 2, 5])
async def test_a_full_engine_is_asked_again_when_one_of_the_batch_has_ended(places: int):
    """Every prompt is answered, as long as the engine takes one at all."""
    service = Places(places)
    prompts = [f"p{number}" for number in range(20)]

    assert prompts == told(await answer_each(service.complete, asks(*prompts)))
    assert places == service.most


async def test_an_engine_that_others_fill_refuses_each():
    """Nothing of this request runs that could make room, so it does not wait for ever."""
    outcomes = await asyncio.wait_for(answer_each(Places(0).complete, asks(*"abcdefgh" * 4)), 5)

    assert ["EngineBusy"] * 32 == told(outcomes)
    assert all(isinstance(outcome, AppError) for outcome in outcomes)


async def test_being_cancelled_cancels_all():
    """Those in the making are closed, and those that wait do not begin."""
    service = Places()
    service.go.clear()
    batch = asyncio.create_task(answer_each(service.complete, asks(*"abcdefgh" * 4)))
    async with asyncio.timeout(5):
        while service.taken < AT_ONCE:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.001)

    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    service.go.set()
    await asyncio.sleep(0.01)

    assert (0, AT_ONCE) == (service.taken, service.begun)


@pytest.mark.parametrize("n", [1, 3])
async def test_several_prompts_are_answered_as_one_ask(n: int):
    """The answers to each prompt follow those to the one before, and the last event tells of all."""
    prompts = [f"p{number}" for number in range(20)]

    reply = await collect(answer_as_one(Places().complete, asks(*prompts, n=n)))

    assert tuple(prompts) == reply.prompts
    assert 20 * n == len(reply.completions)
    assert prompts == [completion.text for completion in reply.completions[::n]]
    assert Usage(20, 20) == reply.finished.usage


@pytest.mark.parametrize(("places", "most"), [(1, 1), (5, 5), (1000, AT_ONCE)])
async def test_as_one_ask_they_take_a_bounded_part_of_the_engine(places: int, most: int):
    """However full it is, all are answered in the end."""
    service = Places(places)
    prompts = [f"p{number}" for number in range(40)]

    reply = await collect(answer_as_one(service.complete, asks(*prompts)))

    assert prompts == [completion.text for completion in reply.completions]
    assert (most, 0) == (service.most, service.taken)


@pytest.mark.parametrize(("prompt", "kind"), [("wrong", InvalidRequest), ("defect", RuntimeError)])
async def test_as_one_ask_they_have_one_fate(prompt: str, kind: type[Exception]):
    """What goes wrong with one ends them all, and nothing is left running."""
    service = Places()

    with pytest.raises(kind):
        await collect(answer_as_one(service.complete, asks("a", "b", prompt, *"cdefgh" * 5)))

    assert 0 == service.taken


async def test_as_one_ask_an_engine_that_others_fill_refuses_them():
    with pytest.raises(EngineBusy):
        await asyncio.wait_for(collect(answer_as_one(Places(0).complete, asks(*"abcdefgh" * 4))), 5)


async def test_leaving_one_stream_of_several_prompts_closes_all():
    """After the first event, with the others in the making or waiting."""
    service = Places()
    service.go.clear()
    events = answer_as_one(service.complete, asks(*"abcdefgh" * 4))

    assert isinstance(await anext(events), Started)
    await events.aclose()

    assert 0 == service.taken
