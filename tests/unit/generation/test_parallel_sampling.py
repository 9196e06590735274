"""Several samples of one request: generated at once, merged, measured as one request, and ended with it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from app.config import CacheConfig
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.errors import EngineBusy, EngineFailed, InvalidRequest
from app.events import CacheStatus, Delta, DetokenizedLogprob, Event, Finished, Started, collect, finish
from app.requests import GenerationRequest
from app.types import FinishReason, Usage
from tests.unit.event_streams import deltas_of, finished_of, started_of
from tests.unit.generation.services import ANNA, chat, complete, serving
from tests.waiting import until

LONG, SOON = 300.0, 60.0
"""Seconds that a completion takes if nobody ends it, and that ending it may take on a busy machine."""


class SamplesEngine(EchoEngine):
    """Generates k + 2 letters as sample k, and records what became of each request."""

    def __init__(self, *, failing: int | None = None, token_delay_seconds: float = 0, **settings: Any) -> None:
        """Args: failing: the sample that breaks as soon as it is admitted."""
        super().__init__(token_delay_seconds=token_delay_seconds, **settings)
        self.failing = failing
        self.delay_seconds = token_delay_seconds
        self.requests: list[GenerationRequest] = []
        self.aborted: set[str] = set()
        self.running = 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        try:
            # The echo engine admits the request, and holds its place while the letters are generated.
            async with aclosing(super().stream(request)) as events:
                yield await anext(events)
                if request.sampling.sample == self.failing:
                    raise EngineFailed("This sample failed.")
                async for event in self.letters(request):
                    yield event
        finally:
            self.running -= 1

    async def letters(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        sample, progress = request.sampling.sample, request.progress
        letter = "abcdefgh"[sample]
        wanted = request.sampling.logprobs is not None
        logprobs = (DetokenizedLogprob(letter, letter.encode(), -0.5),) if wanted else ()
        while progress.generated < sample + 2 and request.id not in self.aborted:
            await asyncio.sleep(self.delay_seconds)
            progress.generated += 1
            yield Delta(text=letter, tokens=1, logprobs=logprobs, token_ends=(1,) * len(logprobs))
        reason = FinishReason.ABORT if request.id in self.aborted else FinishReason.STOP
        yield finish(reason, Usage(request.prompt_tokens, progress.generated, cached_tokens=sample))

    async def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)


def assert_idle(engine: SamplesEngine) -> None:
    assert 0 == engine.running == engine.status().running


async def test_each_sample_is_a_request_with_a_number_and_an_id_of_its_own() -> None:
    """One seed, n draws; nothing else differs, so that the engine can share the prompt."""
    engine = SamplesEngine()
    request = complete("hello", n=3, seed=7)
    async with serving(engine) as service:
        await collect(service.generate(request))

    assert [0, 1, 2] == sorted(each.sampling.sample for each in engine.requests)
    assert set(request.sample_ids) == {each.id for each in engine.requests}
    assert 3 == len(set(request.sample_ids))
    assert request.id == request.sample_ids[0]
    assert {7} == {each.sampling.seed for each in engine.requests}
    assert 1 == len({each.prompt_ids for each in engine.requests})
    assert {1} == {each.n for each in engine.requests}


@pytest.mark.parametrize("request_", [complete("hello", n=3), chat("hi", n=3)], ids=["completion", "chat"])
async def test_samples_are_merged_under_their_index(request_: GenerationRequest) -> None:
    """Started once, the deltas of each sample in order, Finished once at the very end with every sample's."""
    async with serving(SamplesEngine()) as service:
        events = await service.read(request_)

    texts: defaultdict[int, str] = defaultdict(str)
    for event in deltas_of(events):
        assert event.text
        texts[event.index] += event.text
    assert events[1:-1] == deltas_of(events)
    assert started_of(events).index == 0
    assert {0: "aa", 1: "bbb", 2: "cccc"} == texts
    assert [2, 3, 4] == [sample.completion_tokens for sample in finished_of(events).samples]


async def test_samples_come_as_they_are_generated_and_not_one_after_another() -> None:
    """The second has begun before the first has ended."""
    async with serving(SamplesEngine(token_delay_seconds=0.002)) as service:
        indices = [delta.index for delta in deltas_of(await service.read(complete("hello", n=3)))]

    assert {0, 1, 2} == set(indices[:3])


async def test_usage_counts_the_prompt_once_and_every_sample() -> None:
    """Cached tokens are the first sample's: the others share what it computed."""
    async with serving(SamplesEngine()) as service:
        response = await collect(service.generate(complete("hello", n=3)))

        assert [2 + 3 + 4] == [record.completion_tokens for record in service.log.records]
        assert [5 + 2 + 3 + 4] == [reservation.committed for reservation in service.admission.reservations]
        assert [5 + 3 * 100] == [reservation.tokens for reservation in service.admission.reservations]
    assert Usage(prompt_tokens=5, completion_tokens=2 + 3 + 4, cached_tokens=0) == response.finished.usage
    assert ["aa", "bbb", "cccc"] == [completion.text for completion in response.completions]
    assert [FinishReason.STOP] * 3 == [completion.finish_reason for completion in response.completions]
    assert "aa" == response.text


async def test_log_probabilities_belong_to_their_sample() -> None:
    """Each token with its text and bytes; none where the request does not want them."""
    async with serving(SamplesEngine()) as service:
        wanted = await collect(service.generate(complete("hello", n=2, logprobs=0)))
        unwanted = await collect(service.generate(complete("hello", n=2)))

    tokens = [[(token.text, token.raw, token.logprob) for token in each.logprobs] for each in wanted.completions]
    assert [[("a", b"a", -0.5)] * 2, [("b", b"b", -0.5)] * 3] == tokens
    assert [(), ()] == [each.logprobs for each in unwanted.completions]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_token_comes_with_its_own_delta(n: int) -> None:
    """Not with an earlier one of its sample, however far ahead of the reader the engine is."""
    async with serving(SamplesEngine()) as service:
        deltas = deltas_of(await service.read(complete("hello", n=n, logprobs=0)))

    assert [[delta.text] for delta in deltas] == [[token.text for token in delta.logprobs] for delta in deltas]


async def test_a_response_is_a_hit_only_if_all_its_samples_are() -> None:
    """Three samples after two are one generation more; the same three again are none."""
    engine = SamplesEngine()
    async with serving(CachedEngine(engine, CacheConfig())) as service:
        events = [await service.read(complete("hello", n=n)) for n in (2, 3, 3)]

    assert [False, False, True] == [finished_of(each).cached for each in events]
    assert [CacheStatus.MISS, CacheStatus.MISS, CacheStatus.HIT] == [started_of(each).cache for each in events]
    assert 3 == len(engine.requests)


async def test_samples_that_are_replayed_are_charged_as_such_beside_one_that_is_not() -> None:
    """The prompt and the generated sample in full, the replayed ones at their rate; the record counts them all."""
    engine = CachedEngine(SamplesEngine(), CacheConfig())
    async with serving(engine, cached_prompt=0, cached_completion=0.5) as service:
        for n in (2, 3, 3):
            await service.read(complete("hello", n=n))

        charged = [reservation.committed for reservation in service.admission.reservations]
        recorded = [record.completion_tokens for record in service.log.records]

    assert [5 + 2 + 3, 5 + 4 + 3, 5] == charged
    assert [5, 9, 9] == recorded


async def test_if_one_is_refused_all_are_and_nothing_begins() -> None:
    """An engine with room for two refuses three, and both places are free again."""
    engine = SamplesEngine(max_running=2, token_delay_seconds=0.001)
    async with serving(engine) as service:
        with pytest.raises(EngineBusy):
            await anext(service.generate(complete("hello", n=3)))

        assert_idle(engine)
        assert "aa" == (await collect(service.generate(complete("hello", n=2)))).text


async def test_if_one_fails_the_others_are_cancelled() -> None:
    """The error takes the place of Finished, and the model is free."""
    engine = SamplesEngine(failing=1, token_delay_seconds=LONG)
    async with serving(engine) as service, asyncio.timeout(SOON):
        with pytest.raises(EngineFailed, match="This sample failed"):
            await collect(service.generate(complete("hello", n=3)))

        assert_idle(engine)


@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_early_cancels_all(n: int) -> None:
    """However many samples are being generated."""
    engine = SamplesEngine(token_delay_seconds=LONG)
    async with serving(engine) as service:
        stream = service.generate(complete("hello", n=n))
        await anext(stream)
        assert n == engine.running

        async with asyncio.timeout(SOON):
            await stream.aclose()

        assert_idle(engine)


@pytest.mark.parametrize("n", [1, 4])
async def test_being_cancelled_cancels_all(n: int) -> None:
    """As when a client hangs up that waits for whole completions."""
    engine = SamplesEngine(token_delay_seconds=LONG)
    async with serving(engine) as service:
        reading = asyncio.create_task(collect(service.generate(complete("hello", n=n))))
        await until(lambda: engine.running == n)

        reading.cancel()
        async with asyncio.timeout(SOON):
            with pytest.raises(asyncio.CancelledError):
                await reading

        assert_idle(engine)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_hang_up_is_charged_for_every_token_of_every_sample(n: int) -> None:
    """Also those that no delta has delivered, as nearly all are where nothing is streamed."""
    engine = SamplesEngine()
    async with serving(engine) as service:
        stream = service.generate(complete("hello", n=n))
        await anext(stream)
        await anext(stream)
        await until(lambda: engine.running in (0, n))
        await stream.aclose()

        (reservation,) = service.admission.reservations
        generated = sum(each.progress.generated for each in engine.requests)
        assert 5 + generated == reservation.committed
        assert [generated] == [record.completion_tokens for record in service.log.records]
        assert generated >= 1
        assert reservation.released


async def test_a_drain_ends_the_samples_that_are_left_after_the_grace_period() -> None:
    """Also when the first of them, which has the request's own id, is complete already."""
    engine = SamplesEngine(token_delay_seconds=0.05)
    async with serving(engine) as service:
        reading = asyncio.create_task(collect(service.generate(complete("hello", n=8))))
        await until(lambda: engine.running == 8)
        await until(lambda: engine.running < 8)

        await service.host.drain(0)

        reasons = [each.finish_reason for each in (await reading).completions]
    assert (FinishReason.STOP, FinishReason.ABORT) == (reasons[0], reasons[-1])
    assert_idle(engine)


async def test_a_session_continues_with_one_sample_only() -> None:
    """Several are refused by name before anything starts, and the session is not created."""
    engine = SamplesEngine()
    async with serving(engine) as service:
        with pytest.raises(InvalidRequest) as refused:
            await anext(service.generate(chat("hi", n=2, session_id="s")))

        assert [] == await service.turns(ANNA.tenant, "s")
    assert "n" == refused.value.details["errors"][0]["field"]
    assert [] == engine.requests


async def test_what_the_model_cannot_do_is_refused_before_a_sample_starts() -> None:
    """Here a token outside its vocabulary; nothing is reserved for it."""
    engine = SamplesEngine()
    async with serving(engine) as service:
        with pytest.raises(InvalidRequest, match="stop_token_ids"):
            await anext(service.generate(complete("hello", n=2, stop_token_ids=(engine.info.vocab_size,))))

        assert [] == service.admission.reservations
    assert [] == engine.requests


class ControlTokenEngine(EchoEngine):
    """Ends its completion with a token that has no text."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        a, control = DetokenizedLogprob("a", b"a", -1.0), DetokenizedLogprob("<end>", b"<end>", -2.0)
        request.progress.generated = 2
        yield Started(prompt_tokens=request.prompt_tokens)
        yield Delta(text="a", tokens=1, logprobs=(a,), token_ends=(1,))
        yield Delta(tokens=1, logprobs=(control,), token_ends=(0,))
        yield finish(FinishReason.LENGTH, Usage(request.prompt_tokens, 2))


@pytest.mark.parametrize("n", [1, 2])
async def test_a_token_without_text_comes_in_a_delta_of_its_own(n: int) -> None:
    """A delta without text is left out, unless there is a log-probability in it."""
    async with serving(ControlTokenEngine()) as service:
        events = await service.read(complete("hello", n=n, logprobs=0))

    for index in range(n):
        deltas = [delta for delta in deltas_of(events) if delta.index == index]
        assert [("a", [-1.0]), ("", [-2.0])] == [(each.text, [t.logprob for t in each.logprobs]) for each in deltas]
    assert isinstance(events[-1], Finished)
