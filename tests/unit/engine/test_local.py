"""What becomes of each request, with a worker that does what the test says."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path

import pytest
from msgspec import structs

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.engine.tokenizer.prepare import THREADS
from app.errors import (
    AppError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
)
from app.events import Delta, Event, Finished, Started, finish
from app.ipc.messages import Step, Submit, TokenEvent
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason, Message, Role, Tenant, TokenLogprob, Usage
from tests.unit.engine.fake_worker import TOKENIZER, FakeWorkers, begun, engine_on, make_request, tokens
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, read_into, text_of
from tests.unit.tiny_models import save, token_id
from tests.waiting import HANG_SECONDS, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


async def test_a_completion_is_started_its_text_and_finished(folder: Path):
    """The usage counts the end token, which has no text of its own: a delta counts it only if it comes late enough."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request())
        workers.newest.event(1, *tokens("hello world"))
        workers.newest.event(1, finish="stop")
        events = await reading

    count = len(tokens("hello world"))
    assert Started(prompt_tokens=2) == events[0]
    assert "hello world" == text_of(events)
    assert finish(FinishReason.STOP, Usage(2, count + 1)) == events[-1]
    assert [Delta] * (len(events) - 2) == [type(event) for event in events[1:-1]]
    assert sum(delta.tokens for delta in deltas_of(events)) in (count, count + 1)


async def test_a_stop_string_ends_the_completion_and_frees_the_worker(folder: Path):
    """The worker is stopped at once; tokens after the match are neither shown nor counted."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request(stop=(" world",)))
        workers.newest.event(1, *tokens("hello world"), *tokens("and more"))
        events = await reading

        assert [1] == workers.newest.cancelled
        assert 0 == engine.status().running
    assert "hello" == text_of(events)
    assert finish(FinishReason.STOP, Usage(2, len(tokens("hello world"))), " world") == events[-1]


async def test_a_stop_string_that_names_a_special_token_reaches_the_worker_as_that_token(folder: Path):
    """Beside those that the caller names by number; no decoder would show it."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        request = make_request(stop=("<|endoftext|>", "x"), stop_token_ids=(7,))
        reading = await begun(engine, workers.newest, request)
        (submitted,) = [each for each in workers.newest.heard if isinstance(each, Submit)]
        workers.newest.event(1, finish="stop")
        await reading

    assert tuple(sorted((7, token_id(TOKENIZER, "<|endoftext|>")))) == submitted.params.stop_token_ids


async def test_a_text_that_cannot_be_sent_is_refused_and_takes_no_place(folder: Path):
    """The worker would seem to have work without progress, and be killed for it."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, stall_seconds=0.1) as engine:
        with pytest.raises(InvalidRequest, match="not valid Unicode"):
            await read_into([], engine.stream(make_request(stop=("\ud800",))))

        status = engine.status()
        assert (0, 0) == (status.running, status.waiting)
        await asyncio.sleep(0.5)
        assert (EngineState.READY, 1) == (engine.status().state, len(workers.links))


async def test_what_may_be_a_stop_string_is_shown_when_the_completion_ends(folder: Path):
    """Withheld text is part of the completion once no more can come."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request(stop=("world!",)))
        workers.newest.event(1, *tokens("hello world"), finish="length")

        assert "hello world" == text_of(await reading)


async def test_a_slow_reader_gets_what_waits_in_one_delta(folder: Path):
    """However many tokens came meanwhile."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        stream = engine.stream(make_request())
        await anext(stream)
        for number in tokens("hello world, hello"):
            workers.newest.event(1, number)
        workers.newest.event(1, finish="stop")
        await until(lambda: engine.status().running + engine.status().waiting == 0)

        delta, finished = [event async for event in stream]
        assert Delta(text="hello world, hello", tokens=len(tokens("hello world, hello")) + 1) == delta
        assert isinstance(finished, Finished)


def has_generated(request: GenerationRequest, count: int) -> Callable[[], bool]:
    return lambda: request.progress.generated == count


async def completion(folder: Path, *, stream: bool) -> list[Event]:
    """Read a completion token by token as the worker generates it."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        request = make_request(logprobs=1, stream=stream)
        reading = await begun(engine, workers.newest, request)
        for number, token_id in enumerate(tokens("hello world, hello"), 1):
            likely = TokenLogprob(token_id, -0.5, ((token_id, -0.5),))
            workers.newest.event(1, token_id, logprobs=(likely,))
            await until(has_generated(request, number))
        workers.newest.event(1, finish="stop")
        return await reading


async def test_a_request_that_does_not_stream_wakes_its_reader_twice(folder: Path):
    """One delta with the first token and one with the rest: the same completion in every other respect."""
    streamed, whole = [await completion(folder, stream=stream) for stream in (True, False)]

    count = len(tokens("hello world, hello"))
    assert count == len(deltas_of(streamed)) == len(logprobs_of(streamed))
    assert 2 == len(deltas_of(whole))
    assert "hello world, hello" == text_of(streamed) == text_of(whole)
    assert logprobs_of(streamed) == logprobs_of(whole)
    assert finished_of(streamed) == finished_of(whole)
    assert Usage(2, count + 1) == finished_of(whole).usage


@pytest.mark.parametrize("stream", [True, False])
async def test_progress_is_exact_after_a_hang_up(folder: Path, stream: bool):
    """What the worker generated until then, of which a request that does not stream has seen one token."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        request = make_request(stream=stream)
        events = engine.stream(request)
        await anext(events)
        for token_id in tokens("hello world"):
            workers.newest.event(1, token_id)
        await until(lambda: request.progress.generated == len(tokens("hello world")))
        await anext(events)

        await events.aclose()
        workers.newest.event(1, 5, 6)
        workers.newest.event(1, finish="abort")
        await asyncio.sleep(0.01)

    assert len(tokens("hello world")) == request.progress.generated


async def test_a_prompt_is_encoded_with_the_models_own_tokenizer(folder: Path):
    """A text, a chat, a chat to be continued, or tokens as they are; and tokens become their text again."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        text = GenerationRequest(id="1", tenant=Tenant.owner("t"), text="hello world")
        chat = GenerationRequest(id="2", tenant=Tenant.owner("t"), messages=(Message(Role.USER, "hello"),))
        continued = GenerationRequest(
            id="3", tenant=Tenant.owner("t"), messages=(Message(Role.ASSISTANT, "hello"),), continue_final_message=True
        )
        prepared = [await engine.prepare(each) for each in (text, chat, continued, make_request())]

        assert tuple(tokens("hello world")) == prepared[0].prompt_ids
        decoded = [str(TOKENIZER.decode(list(each.prompt_ids or ()))) for each in prepared]
        assert decoded[1].endswith("assistant\n")
        assert decoded[2].endswith("hello")
        assert (1, 2) == prepared[3].prompt_ids
        assert all(each.prompt_tokens == len(each.prompt_ids or ()) > 0 for each in prepared)
        assert "hello world" == await engine.detokenize(tokens("hello world"))


async def test_closing_a_stream_cancels_its_request(folder: Path):
    """In the worker at once, its slot is free at once, and late events reach nobody."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        stream = engine.stream(make_request())
        await anext(stream)
        await stream.aclose()
        workers.newest.event(1, 5, 6)
        workers.newest.event(1, finish="abort")
        await asyncio.sleep(0.01)

        assert [1] == workers.newest.cancelled
        assert 0 == engine.status().waiting
        reading = await begun(engine, workers.newest, make_request())
        workers.newest.event(2, *tokens("next"), finish="length")
        assert "next" == text_of(await reading)


async def test_a_prompt_that_comes_after_the_end_is_refused_at_once(folder: Path):
    """It does not wait for the threads that have ended with the engine."""
    async with engine_on(FakeWorkers(folder)) as engine:
        texts = [
            GenerationRequest(id=f"{number}", tenant=Tenant.owner("tenant"), text="hello " * 10_000)
            for number in range(THREADS)
        ]
        await asyncio.gather(*map(engine.prepare, texts))

    async with asyncio.timeout(HANG_SECONDS):
        with pytest.raises(EngineNotReady, match="closed"):
            await engine.prepare(texts[0])


async def test_an_abort_ends_the_stream_with_what_it_has(folder: Path):
    """The text so far, then ABORT with its usage; an id that is not live is ignored."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request("mine"))
        workers.newest.event(1, *tokens("so"))
        await asyncio.sleep(0.01)
        await engine.abort("another")
        await engine.abort("mine")
        await engine.abort("mine")
        events = await reading

    assert "so" == text_of(events)
    assert finish(FinishReason.ABORT, Usage(2, len(tokens("so")))) == events[-1]


async def test_one_request_more_than_fits_is_refused(folder: Path):
    """One runs and one waits; the third learns when to come back, and a free place takes it."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, max_waiting=1) as engine:
        first, second = engine.stream(make_request("a")), engine.stream(make_request("b"))
        await anext(first)
        await anext(second)
        with pytest.raises(EngineBusy) as refusal:
            await anext(engine.stream(make_request("c")))
        assert (refusal.value.retry_after or 0) >= 1

        await first.aclose()
        third = engine.stream(make_request("c"))
        assert Started(prompt_tokens=2) == await anext(third)
        for stream in (second, third):
            await stream.aclose()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (make_request(prompt=()), InvalidRequest),
        (make_request(prompt=(1,) * 15, max_tokens=50), ContextLengthExceeded),
        (make_request("taken"), ValueError),
    ],
    ids=["empty", "too long", "a live id"],
)
async def test_a_request_that_does_not_fit_is_refused(
    folder: Path, request_: GenerationRequest, error: type[Exception]
):
    """It never reaches the worker, and takes no slot."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        other = engine.stream(make_request("taken", prompt=(1,) * 14, max_tokens=50))
        await anext(other)
        with pytest.raises(error):
            await anext(engine.stream(request_))
        assert [1] == workers.newest.open
        await other.aclose()


@pytest.mark.parametrize(
    ("deadlines", "worker_events"),
    [
        (DeadlineConfig(waiting_seconds=0.05), 0),
        (DeadlineConfig(first_token_seconds=0.05), 1),
        (DeadlineConfig(total_seconds=0.05), 2),
    ],
    ids=["waiting", "first token", "total"],
)
async def test_a_deadline_ends_the_request_in_the_worker_too(
    folder: Path, deadlines: DeadlineConfig, worker_events: int
):
    """Each phase has its own; what was generated before is still delivered."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, deadlines=deadlines) as engine:
        events: list[Event] = []
        reading = asyncio.create_task(read_into(events, engine.stream(make_request())))
        await until(lambda: engine.status().waiting == 1)
        for token_ids in [(), tokens("so")][:worker_events]:
            workers.newest.event(1, *token_ids)
        with pytest.raises(DeadlineExceeded):
            await reading

        assert ("so" if worker_events == 2 else "") == text_of(events)
        assert [1] == workers.newest.cancelled


async def test_a_deadline_holds_for_one_phase_only(folder: Path):
    """A request that began in time is not ended by the deadline for waiting."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, deadlines=DeadlineConfig(waiting_seconds=0.05, first_token_seconds=60)) as engine:
        reading = await begun(engine, workers.newest, make_request())
        await asyncio.sleep(0.1)
        workers.newest.event(1, *tokens("late"), finish="length")

        assert "late" == text_of(await reading)


async def test_an_error_that_the_request_caused_is_not_the_models(folder: Path):
    """The same request would fail again: its client is told what to change, not to come back."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request())
        workers.newest.say(Step([TokenEvent(1, error="The settings rule out all tokens.", invalid=True)]))

        with pytest.raises(InvalidRequest, match="rule out all tokens"):
            await reading


async def test_an_error_of_the_worker_is_the_end_of_that_request(folder: Path):
    """The others continue."""
    workers = FakeWorkers(folder, slots=2)
    async with engine_on(workers) as engine:
        first = await begun(engine, workers.newest, make_request("a"))
        second = await begun(engine, workers.newest, make_request("b"))
        workers.newest.event(1, error="The model failed on this request.")
        workers.newest.event(2, *tokens("fine"), finish="length")

        with pytest.raises(EngineFailed, match="failed on this request"):
            await first
        assert "fine" == text_of(await second)


async def test_a_decoder_that_fails_ends_only_its_request(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A defect in decoding the completion is an error of that request, and the worker stays."""

    def fail(decoder: object, token_ids: object) -> str:
        raise RuntimeError("defect")

    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request())
        monkeypatch.setattr("app.engine.tokenizer.hf_tokenizer.StreamDecoder.feed", fail)
        workers.newest.event(1, 5)

        with pytest.raises(AppError, match="decoded"):
            await reading
        assert [1] == workers.newest.cancelled
        assert EngineState.READY == engine.status().state


def of(tenant: str, name: str, *, prompt: tuple[int, ...] = (1, 2)) -> GenerationRequest:
    return structs.replace(make_request(f"{tenant} {name}", prompt=prompt), tenant=Tenant.owner(tenant))


async def admitted(engine: LocalEngine, requests: Iterable[GenerationRequest]) -> list[AsyncGenerator[Event, None]]:
    """Send requests until one is refused; return the streams of the others."""
    streams: list[AsyncGenerator[Event, None]] = []
    for request in requests:
        stream = engine.stream(request)
        try:
            await anext(stream)
        except EngineBusy:
            return streams
        streams.append(stream)
    return streams


async def test_a_tenant_that_fills_the_line_leaves_places_for_others(folder: Path):
    """Alone it has all that wait; a newcomer finds places beside it, and the first gets none before it has fewer."""
    async with engine_on(FakeWorkers(folder, slots=2), max_waiting=6) as engine:
        greedy = await admitted(engine, (of("greedy", str(number)) for number in range(50)))
        newcomer = await admitted(engine, (of("newcomer", str(number)) for number in range(50)))
        third = await admitted(engine, (of("third", str(number)) for number in range(50)))
        for stream in greedy[4:]:
            await stream.aclose()
        again = await admitted(engine, [of("greedy", "again")])
        grown = await admitted(engine, (of("newcomer", f"more {number}") for number in range(50)))
        counts = [len(streams) for streams in (greedy, newcomer, third, again, grown)]
        for stream in (*greedy, *newcomer, *third, *again, *grown):
            await stream.aclose()

    assert [8, 4, 2] == counts[:3]
    assert counts[4] > 0
    assert counts[4] + 4 >= 4 + counts[3]


async def test_however_full_the_line_is_each_tenant_may_have_one_request_in_it(folder: Path):
    """Many tenants that all send what they can keep none of them out."""
    async with engine_on(FakeWorkers(folder, slots=1), max_waiting=3) as engine:
        names = [f"tenant {number}" for number in range(20)]
        streams = [await admitted(engine, (of(name, str(number)) for number in range(9))) for name in names]
        for stream in (each for own in streams for each in own):
            await stream.aclose()

    assert min(map(len, streams)) == 1


async def test_the_tokens_of_waiting_prompts_are_shared_too(folder: Path):
    """A tenant's long prompts keep no other's prompt out."""
    workers, prompt = FakeWorkers(folder, slots=1), (1,) * 10
    config = ModelConfig(max_waiting=50, max_waiting_tokens=40)
    engine = LocalEngine(config, DeadlineConfig(), launch=workers, backoff_seconds=0)
    await engine.start()
    await engine.wait_ready()
    greedy = await admitted(engine, (of("greedy", str(number), prompt=prompt) for number in range(20)))
    newcomer = await admitted(engine, (of("newcomer", str(number), prompt=prompt) for number in range(20)))
    for stream in (*greedy, *newcomer):
        await stream.aclose()
    await engine.close()

    assert [4, 2] == [len(greedy), len(newcomer)]


async def test_a_single_request_of_several_samples_may_wait_however_long_its_prompt_is(folder: Path):
    """Its samples have one prompt together; a second request of that tenant finds no room for its own."""
    engine = LocalEngine(ModelConfig(max_waiting_tokens=20), DeadlineConfig(), launch=FakeWorkers(folder))
    await engine.start()
    await engine.wait_ready()

    def samples(name: str) -> Iterable[GenerationRequest]:
        return structs.replace(of("lone", name, prompt=(1,) * 12), n=8).samples()

    first = await admitted(engine, samples("first"))
    second = await admitted(engine, samples("second"))
    for stream in (*first, *second):
        await stream.aclose()
    await engine.close()

    assert [8, 0] == [len(first), len(second)]


async def test_the_stages_of_a_request_are_timed(folder: Path):
    """When the engine took it, the worker began on it, its first token came, and it ended."""
    workers = FakeWorkers(folder)
    request = make_request()
    times = request.progress.times
    async with engine_on(workers) as engine:
        reading = asyncio.create_task(read_into([], engine.stream(request)))
        await until(lambda: times.accepted is not None)
        assert (None, None, None) == (times.began, times.first_token, times.ended)
        workers.newest.event(1)
        await until(lambda: times.began is not None)
        workers.newest.event(1, *tokens("hello"))
        await until(lambda: times.first_token is not None)
        assert times.ended is None
        workers.newest.event(1, finish="stop")
        await reading

    moments = [each for each in (times.accepted, times.began, times.first_token, times.ended) if each is not None]
    assert 4 == len(moments)
    assert sorted(moments) == moments


class CountedSteps:
    """Remembers the steps of a model."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.lost = 0

    def step(self, seconds: float, /) -> None:
        self.seconds.append(seconds)

    def preempted(self, count: int, /) -> None:
        self.lost += count


async def test_the_worker_s_steps_are_counted(folder: Path):
    workers, steps = FakeWorkers(folder), CountedSteps()
    async with engine_on(workers, metrics=steps):
        workers.newest.say(Step([], (0.01, 0.02), 1))
        workers.newest.say(Step([], (0.03,)))
        await until(lambda: len(steps.seconds) == 3)

    assert ([0.01, 0.02, 0.03], 1) == (steps.seconds, steps.lost)


async def test_the_adapters_of_running_and_waiting_requests_are_named(folder: Path):
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, structs.replace(make_request("a"), adapter="first"))
        waiting = asyncio.create_task(
            read_into([], engine.stream(structs.replace(make_request("b"), adapter="second")))
        )
        await until(lambda: engine.status().waiting == 1)
        named = engine.adapters_in_use()
        await engine.abort("a")
        await engine.abort("b")
        await asyncio.gather(reading, waiting)

    assert (("first",), ("second",)) == named
