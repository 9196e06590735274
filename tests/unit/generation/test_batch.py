"""Many prompts of one HTTP request: bounded, each with its own outcome, cancelled together."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from app.errors import AppError, EngineBusy, InvalidRequest
from app.events import CacheStatus, Delta, Event, Finished, FinishedSample, Response, Started, collect
from app.generation import batch
from app.generation.batch import MAX_PARALLEL, generate_as_one, generate_each
from app.requests import GenerationRequest
from app.types import FinishReason, Usage
from tests.unit.event_streams import read
from tests.unit.generation.services import complete
from tests.waiting import HANG_SECONDS


class LimitedService:
    """A service with room for so many samples at once, which generates its prompts."""

    def __init__(self, places: int = 1000) -> None:
        self.places = places
        self.taken = self.most = self.begun = self.attempts = 0
        self.cached: set[str | None] = set()
        """Prompts whose responses are replayed."""
        self.go = asyncio.Event()
        self.go.set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        samples = request.n
        self.attempts += 1
        await asyncio.sleep(0)
        if self.taken + samples > self.places:
            raise EngineBusy("Full.", retry_after=0.01)
        self.begun += 1
        self.taken += samples
        self.most = max(self.most, self.taken)
        status = CacheStatus.HIT if request.text in self.cached else CacheStatus.MISS
        try:
            yield Started(model="m", prompt=request.text, cache=status)
            await self.go.wait()
            for _ in range(3):
                await asyncio.sleep(0)
            if request.text == "wrong":
                raise InvalidRequest("This prompt is wrong.")
            if request.text == "defect":
                raise RuntimeError("defect")
            yield Delta(text=request.text or "")
            end = FinishedSample(finish_reason=FinishReason.STOP, completion_tokens=1)
            yield Finished(model="m", samples=(end,) * samples, usage=Usage(1, 1), cache=status)
        finally:
            self.taken -= samples


def requests(*prompts: str, n: int = 1) -> list[GenerationRequest]:
    return [complete(prompt, n=n) for prompt in prompts]


def texts_of(outcomes: list[Response | Exception]) -> list[str]:
    return [outcome.text if isinstance(outcome, Response) else type(outcome).__name__ for outcome in outcomes]


@pytest.mark.parametrize(("n", "most"), [(1, MAX_PARALLEL), (3, MAX_PARALLEL // 3 * 3), (8, MAX_PARALLEL)])
async def test_responses_come_in_the_order_of_the_requests_and_only_so_many_run_at_once(n: int, most: int):
    """However many samples each wants, one request takes a bounded part of the engine."""
    service = LimitedService()
    prompts = [f"p{number}" for number in range(40)]

    outcomes = await generate_each(service.generate, requests(*prompts, n=n))

    assert prompts == texts_of(outcomes)
    assert most == service.most
    assert 0 == service.taken


async def test_what_goes_wrong_with_one_stands_in_its_place():
    """A refusal, or a defect of ours, and all others have their responses."""
    outcomes = await generate_each(LimitedService().generate, requests("a", "wrong", "b", "defect", "c"))

    assert ["a", "InvalidRequest", "b", "RuntimeError", "c"] == texts_of(outcomes)


@pytest.mark.parametrize("places", [1, 2, 5])
async def test_a_full_engine_gets_a_request_again_when_one_of_the_batch_has_ended(places: int):
    """Every prompt has its response, as long as the engine takes one at all."""
    service = LimitedService(places)
    prompts = [f"p{number}" for number in range(20)]

    assert prompts == texts_of(await generate_each(service.generate, requests(*prompts)))
    assert places == service.most


async def test_an_engine_that_others_fill_refuses_each():
    """Nothing of this request runs that could make room, so it does not wait for ever."""
    outcomes = await asyncio.wait_for(
        generate_each(LimitedService(0).generate, requests(*"abcdefgh" * 4)), HANG_SECONDS
    )

    assert ["EngineBusy"] * 32 == texts_of(outcomes)
    assert all(isinstance(outcome, AppError) for outcome in outcomes)


async def test_a_batch_of_which_nothing_is_taken_costs_few_attempts():
    """The engine is full of others' requests: those of the batch that have not been tried are not tried either."""
    service = LimitedService(0)

    outcomes = await generate_each(service.generate, requests(*(f"p{number}" for number in range(64))))

    assert ["EngineBusy"] * 64 == texts_of(outcomes)
    assert service.attempts <= MAX_PARALLEL


async def test_a_batch_that_has_begun_waits_for_a_place_a_while(monkeypatch: pytest.MonkeyPatch):
    """Others take its place in between; the rest of it is generated once there is one again."""
    service = LimitedService(1)

    async def take_place(seconds: float) -> None:
        while service.begun < 2:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)
        service.places = 0
        await asyncio.sleep(seconds)
        service.places = 1

    taking = asyncio.create_task(take_place(0.05))
    outcomes = await asyncio.wait_for(generate_each(service.generate, requests(*"abcdef")), HANG_SECONDS)
    await taking
    monkeypatch.setattr(batch, "WAIT_SECONDS", 0.03)
    service.begun, service.places = 0, 1
    closing = asyncio.create_task(take_place(HANG_SECONDS))
    late = await asyncio.wait_for(generate_each(service.generate, requests(*"abcdef")), HANG_SECONDS)
    closing.cancel()

    assert list("abcdef") == texts_of(outcomes)
    assert {"EngineBusy"} == set(texts_of(late)) - set("abcdef")


async def test_being_cancelled_cancels_all():
    """Those that run are closed, and those that wait do not begin."""
    service = LimitedService()
    service.go.clear()
    batch = asyncio.create_task(generate_each(service.generate, requests(*"abcdefgh" * 4)))
    async with asyncio.timeout(HANG_SECONDS):
        while service.taken < MAX_PARALLEL:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.001)

    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    service.go.set()
    await asyncio.sleep(0.01)

    assert (0, MAX_PARALLEL) == (service.taken, service.begun)


@pytest.mark.parametrize("n", [1, 3])
async def test_several_prompts_have_one_response(n: int):
    """The samples of each prompt follow those of the one before, and the last event counts all."""
    prompts = [f"p{number}" for number in range(20)]

    response = await collect(generate_as_one(LimitedService().generate, requests(*prompts, n=n)))

    assert tuple(prompts) == response.prompts
    assert 20 * n == len(response.completions)
    assert prompts == [completion.text for completion in response.completions[::n]]
    assert Usage(20, 20) == response.finished.usage


@pytest.mark.parametrize(("places", "most"), [(1, 1), (5, 5), (1000, MAX_PARALLEL)])
async def test_as_one_response_they_take_a_bounded_part_of_the_engine(places: int, most: int):
    """However full it is, all are generated in the end."""
    service = LimitedService(places)
    prompts = [f"p{number}" for number in range(40)]

    response = await collect(generate_as_one(service.generate, requests(*prompts)))

    assert prompts == [completion.text for completion in response.completions]
    assert (most, 0) == (service.most, service.taken)


@pytest.mark.parametrize(("prompt", "kind"), [("wrong", InvalidRequest), ("defect", RuntimeError)])
async def test_as_one_response_they_have_one_outcome(prompt: str, kind: type[Exception]):
    """What goes wrong with one ends them all, and nothing is left running."""
    service = LimitedService()

    with pytest.raises(kind):
        await collect(generate_as_one(service.generate, requests("a", "b", prompt, *"cdefgh" * 5)))

    assert 0 == service.taken


async def test_as_one_response_an_engine_that_others_fill_refuses_them():
    """It does not wait for what will not come."""
    with pytest.raises(EngineBusy):
        await asyncio.wait_for(
            collect(generate_as_one(LimitedService(0).generate, requests(*"abcdefgh" * 4))), HANG_SECONDS
        )


async def test_leaving_one_stream_of_several_prompts_closes_all():
    """After the first event, while the others run or wait."""
    service = LimitedService()
    service.go.clear()
    events = generate_as_one(service.generate, requests(*"abcdefgh" * 4))

    assert isinstance(await anext(events), Started)
    await events.aclose()

    assert 0 == service.taken


@pytest.mark.parametrize(
    ("cached", "started", "finished"),
    [
        (set(), CacheStatus.MISS, CacheStatus.MISS),
        ({"a"}, CacheStatus.MISS, CacheStatus.MISS),
        ({"a", "b"}, CacheStatus.MISS, CacheStatus.HIT),
    ],
    ids=["none", "one of two", "both"],
)
async def test_one_response_is_a_hit_only_if_all_its_prompts_are(
    cached: set[str | None], started: CacheStatus, finished: CacheStatus
):
    """Which is not known before its end."""
    service = LimitedService()
    service.cached = cached

    events = await read(generate_as_one(service.generate, requests("a", "b")))

    assert {started} == {event.cache for event in events if isinstance(event, Started)}
    assert [finished] == [event.cache for event in events if isinstance(event, Finished)]
