"""The engine's bookkeeping, with a worker that does what the test says."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.config import DeadlineConfig, ModelConfig
from app.engine.base import Chunk, EngineState, GenerationRequest
from app.engine.local import LocalEngine
from app.engine.worker.messages import LoadFailed, Loading
from app.errors import (
    AppError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
)
from app.types import FinishReason, Params, Usage
from tests.unit.engine.fake_worker import FakeLink, FakeWorkers
from tests.unit.engine.tiny import chatml_tokenizer, save

TOKENIZER = chatml_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def engine_on(
    workers: FakeWorkers, *, max_waiting: int = 8, deadlines: DeadlineConfig | None = None, **options: Any
) -> AsyncIterator[LocalEngine]:
    """An engine that is ready, and closed at the end."""
    options = {"backoff_seconds": 0.0} | options
    engine = LocalEngine(ModelConfig(max_waiting=max_waiting), deadlines or DeadlineConfig(), launch=workers, **options)
    await engine.start()
    if workers.ready:
        await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.close()


def ask(
    name: str = "one", *, stop: tuple[str, ...] = (), prompt: tuple[int, ...] = (1, 2), max_tokens: int = 50
) -> Any:
    return GenerationRequest(name, "tenant", prompt, Params(max_tokens=max_tokens, stop=stop))


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never happened")


async def read(engine: LocalEngine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(request)]


async def collect(chunks: list[Chunk], stream: AsyncIterator[Chunk]) -> None:
    """Read an answer, keeping what came before an error."""
    async for chunk in stream:
        chunks.append(chunk)


async def begun(engine: LocalEngine, link: FakeLink, request: GenerationRequest) -> asyncio.Task[list[Chunk]]:
    """Start to read an answer, and let the worker begin on it."""
    before = len(link.open)
    task = asyncio.create_task(read(engine, request))
    await until(lambda: len(link.open) > before or task.done())
    link.event(link.open[-1])
    await until(lambda: engine.status().running > 0)
    return task


async def test_an_answer_is_an_empty_chunk_its_text_and_one_end(folder: Path):
    """Tokens are counted with the end token, over the chunks as in the usage."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask())
        workers.newest.event(1, *tokens("hello world"))
        workers.newest.event(1, finish="stop")
        chunks = await reading

    count = len(tokens("hello world")) + 1
    assert Chunk() == chunks[0]
    assert "hello world" == "".join(chunk.text for chunk in chunks)
    assert (FinishReason.STOP, Usage(2, count)) == (chunks[-1].finish_reason, chunks[-1].usage)
    assert [None] * (len(chunks) - 1) == [chunk.usage or chunk.finish_reason for chunk in chunks[:-1]]
    assert count == sum(chunk.tokens for chunk in chunks)


async def test_a_stop_string_ends_the_answer_and_frees_the_worker(folder: Path):
    """The worker is told to stop at once; tokens after the match are neither shown nor counted."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask(stop=(" world",)))
        workers.newest.event(1, *tokens("hello world"), *tokens("and more"))
        chunks = await reading

        assert [1] == workers.newest.cancelled
        assert 0 == engine.status().running
    assert "hello" == "".join(chunk.text for chunk in chunks)
    assert (FinishReason.STOP, Usage(2, len(tokens("hello world")))) == (chunks[-1].finish_reason, chunks[-1].usage)


async def test_what_may_be_a_stop_string_is_shown_when_the_answer_ends(folder: Path):
    """Held back text is part of the answer once no more can come."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask(stop=("world!",)))
        workers.newest.event(1, *tokens("hello world"), finish="length")

        assert "hello world" == "".join(chunk.text for chunk in await reading)


async def test_a_slow_reader_gets_what_waits_as_one_piece(folder: Path):
    """However many tokens came meanwhile, one chunk holds their text."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        stream = engine.stream(ask())
        await anext(stream)
        for number in tokens("hello world, hello"):
            workers.newest.event(1, number)
        workers.newest.event(1, finish="stop")
        await until(lambda: engine.status().running + engine.status().waiting == 0)

        assert ["hello world, hello", ""] == [chunk.text async for chunk in stream]


async def test_closing_a_stream_cancels_its_request(folder: Path):
    """The worker is told at once, the place is free at once, and late events find nobody."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        stream = engine.stream(ask())
        await anext(stream)
        await stream.aclose()
        workers.newest.event(1, 5, 6)
        workers.newest.event(1, finish="abort")
        await asyncio.sleep(0.01)

        assert [1] == workers.newest.cancelled
        assert 0 == engine.status().waiting
        reading = await begun(engine, workers.newest, ask())
        workers.newest.event(2, *tokens("next"), finish="length")
        assert "next" == "".join(chunk.text for chunk in await reading)


async def test_an_abort_ends_the_stream_with_what_it_has(folder: Path):
    """The text so far, then ABORT with its usage; an id that is not live is ignored."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask("mine"))
        workers.newest.event(1, *tokens("so"))
        await asyncio.sleep(0.01)
        await engine.abort("another")
        await engine.abort("mine")
        await engine.abort("mine")
        chunks = await reading

    assert "so" == "".join(chunk.text for chunk in chunks)
    assert (FinishReason.ABORT, Usage(2, len(tokens("so")))) == (chunks[-1].finish_reason, chunks[-1].usage)


async def test_one_request_more_than_fits_is_refused(folder: Path):
    """One runs and one waits; the third is told when to come back, and a free place takes it."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, max_waiting=1) as engine:
        first, second = engine.stream(ask("a")), engine.stream(ask("b"))
        await anext(first)
        await anext(second)
        with pytest.raises(EngineBusy) as refusal:
            await anext(engine.stream(ask("c")))
        assert (refusal.value.retry_after or 0) >= 1

        await first.aclose()
        third = engine.stream(ask("c"))
        assert Chunk() == await anext(third)
        for stream in (second, third):
            await stream.aclose()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (ask(prompt=()), InvalidRequest),
        (ask(prompt=(1,) * 15, max_tokens=50), ContextLengthExceeded),
        (ask("taken"), ValueError),
    ],
    ids=["empty", "too long", "a live id"],
)
async def test_a_request_that_does_not_fit_is_refused(
    folder: Path, request_: GenerationRequest, error: type[Exception]
):
    """It never reaches the worker, and takes no place."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        other = engine.stream(ask("taken", prompt=(1,) * 14, max_tokens=50))
        await anext(other)
        with pytest.raises(error):
            await anext(engine.stream(request_))
        assert [1] == workers.newest.open
        await other.aclose()


@pytest.mark.parametrize(
    ("deadlines", "events"),
    [
        (DeadlineConfig(waiting_seconds=0.05), 0),
        (DeadlineConfig(first_token_seconds=0.05), 1),
        (DeadlineConfig(total_seconds=0.05), 2),
    ],
    ids=["waiting", "first token", "total"],
)
async def test_a_deadline_ends_the_request_in_the_worker_too(folder: Path, deadlines: DeadlineConfig, events: int):
    """Each phase has its own; what was said before is still delivered."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, deadlines=deadlines) as engine:
        chunks: list[Chunk] = []
        reading = asyncio.create_task(collect(chunks, engine.stream(ask())))
        await until(lambda: engine.status().waiting == 1)
        for event in [(), tokens("so")][:events]:
            workers.newest.event(1, *event)
        with pytest.raises(DeadlineExceeded):
            await reading

        assert ("so" if events == 2 else "") == "".join(chunk.text for chunk in chunks)
        assert [1] == workers.newest.cancelled


async def test_a_deadline_holds_for_one_phase_only(folder: Path):
    """A request that began in time is not ended by the deadline for waiting."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, deadlines=DeadlineConfig(waiting_seconds=0.05, first_token_seconds=60)) as engine:
        reading = await begun(engine, workers.newest, ask())
        await asyncio.sleep(0.1)
        workers.newest.event(1, *tokens("late"), finish="length")

        assert "late" == "".join(chunk.text for chunk in await reading)


async def test_an_error_of_the_worker_is_the_end_of_that_request(folder: Path):
    """The others go on."""
    workers = FakeWorkers(folder, slots=2)
    async with engine_on(workers) as engine:
        first = await begun(engine, workers.newest, ask("a"))
        second = await begun(engine, workers.newest, ask("b"))
        workers.newest.event(1, error="The model failed on this request.")
        workers.newest.event(2, *tokens("fine"), finish="length")

        with pytest.raises(EngineFailed, match="failed on this request"):
            await first
        assert "fine" == "".join(chunk.text for chunk in await second)


async def test_a_dead_worker_fails_every_request_and_is_started_again(folder: Path):
    """The restart is counted, the cause is kept until it serves again, and new requests are answered."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        running, waiting = await begun(engine, workers.newest, ask("a")), asyncio.create_task(read(engine, ask("b")))
        await until(lambda: engine.status().waiting == 1)
        workers.ready = False
        workers.newest.kill()
        for reading in (running, waiting):
            with pytest.raises(EngineFailed):
                await reading

        assert (EngineState.RESTARTING, "The fake worker is gone.") == (engine.status().state, engine.status().error)
        with pytest.raises(EngineNotReady):
            await read(engine, ask("c"))
        await until(lambda: len(workers.links) == 2)
        workers.newest.say(workers.message)
        await engine.wait_ready()
        assert (EngineState.READY, 1, None) == (engine.status().state, engine.status().restarts, engine.status().error)
        assert workers.links[0].stopped


async def test_new_starts_come_ever_later(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Each failure in a row doubles the pause, up to half a minute."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds >= 1:  # shorter ones are the watchdog's and this test's
            pauses.append(seconds)
        await sleep(0)

    workers = FakeWorkers(folder)
    async with engine_on(workers, backoff_seconds=1.0, hang_seconds=1.0) as engine:
        monkeypatch.setattr("app.engine.supervisor.asyncio.sleep", note)
        for number in range(1, 8):
            workers.ready = False
            workers.newest.say(LoadFailed("no memory"))
            await until(partial(lambda before: len(workers.links) > before, number))
        monkeypatch.undo()

        assert [1, 2, 4, 8, 16, 30, 30] == pauses
        assert (EngineState.RESTARTING, "no memory") == (engine.status().state, engine.status().error)


async def test_a_worker_that_served_for_a_while_is_replaced_soon(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A death now and then does not add up: the pause does not grow."""
    monkeypatch.setattr("app.engine.supervisor.HEALTHY_SECONDS", 0)
    workers = FakeWorkers(folder)
    async with engine_on(workers, backoff_seconds=0.05) as engine:
        began = time.monotonic()
        for _ in range(6):
            workers.newest.kill()
            await until(lambda: engine.status().state is EngineState.RESTARTING)
            await engine.wait_ready()

    assert time.monotonic() - began < 0.05 * (2**6 - 1)


@pytest.mark.parametrize("fail", [lambda link: link.say(LoadFailed("it is odd")), FakeLink.kill], ids=["told", "died"])
async def test_a_model_that_never_loaded_is_given_up(folder: Path, fail: Callable[[FakeLink], None]):
    """Trying again would not help: who waits is told why, and nothing is started again."""
    workers = FakeWorkers(folder, ready=False)
    async with engine_on(workers) as engine:
        waiting = asyncio.create_task(engine.wait_ready())
        await until(lambda: len(workers.links) == 1)
        fail(workers.newest)

        with pytest.raises(EngineFailed, match=r"odd|gone"):
            await waiting
        assert EngineState.FAILED == engine.status().state
        with pytest.raises(EngineNotReady, match="could not be loaded"):
            await read(engine, ask())
        assert 1 == len(workers.links)


async def test_a_process_that_cannot_be_started_is_a_failed_load():
    """The system's reason reaches the operator."""

    async def launch() -> FakeLink:
        raise OSError(11, "Resource temporarily unavailable")

    engine = LocalEngine(ModelConfig(), DeadlineConfig(), launch=launch)
    await engine.start()

    with pytest.raises(EngineFailed, match="temporarily unavailable"):
        await engine.wait_ready()
    await engine.close()


async def test_before_the_model_is_loaded_the_client_is_told_to_wait(folder: Path):
    """With the stage of the load, and a time to come back."""
    workers = FakeWorkers(folder, ready=False)
    async with engine_on(workers) as engine:
        await until(lambda: len(workers.links) == 1)
        workers.newest.say(Loading("weights"))
        await asyncio.sleep(0.01)

        for use in (lambda: engine.info, lambda: engine.tokenizer):
            with pytest.raises(EngineNotReady, match="weights"):
                use()
        with pytest.raises(EngineNotReady) as refusal:
            await read(engine, ask())
        assert (refusal.value.retry_after or 0) > 0


async def test_a_tokenizer_that_cannot_be_read_is_a_failed_load(tmp_path: Path):
    """The engine does not become ready without one."""
    engine = LocalEngine(ModelConfig(), DeadlineConfig(), launch=FakeWorkers(tmp_path))
    await engine.start()

    with pytest.raises(EngineFailed, match="tokenizer"):
        await engine.wait_ready()
    await engine.close()


async def test_a_worker_that_hangs_is_ended(folder: Path):
    """Silence with work to do is a death; silence without work is rest."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, hang_seconds=0.1) as engine:
        await asyncio.sleep(0.2)
        assert 1 == len(workers.links)

        with pytest.raises(EngineFailed):
            await read(engine, ask())
        assert "no progress for 0.1 s" in str(engine.status().error) or engine.status().state is EngineState.READY
        await until(lambda: len(workers.links) == 2)


async def test_a_request_that_nobody_reads_any_more_still_counts_as_work(folder: Path):
    """A worker that hangs on a cancelled request is found out too."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, hang_seconds=0.1) as engine:
        stream = engine.stream(ask())
        await anext(stream)
        await stream.aclose()

        await until(lambda: len(workers.links) == 2)


async def test_closing_ends_live_streams_and_is_final(folder: Path):
    """They end with ABORT, the worker is told to leave, and whoever comes later is refused."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask())
        await asyncio.gather(engine.close(), engine.close())
        await engine.close()
        await engine.start()

        assert FinishReason.ABORT == (await reading)[-1].finish_reason
        assert EngineState.CLOSED == engine.status().state
        assert workers.newest.stopped
        with pytest.raises(EngineNotReady):
            await read(engine, ask())
        with pytest.raises(EngineFailed):
            await engine.wait_ready()
        assert 1 == len(asyncio.all_tasks())


@pytest.mark.parametrize("start", [True, False], ids=["while it loads", "before it starts"])
async def test_an_engine_without_a_model_closes_at_once(folder: Path, start: bool):
    """Nothing is left, and who waited for the model is told."""
    workers = FakeWorkers(folder, ready=False)
    engine = LocalEngine(ModelConfig(), DeadlineConfig(), launch=workers)
    if start:
        await engine.start()
        await until(lambda: len(workers.links) == 1)
    waiting = asyncio.create_task(engine.wait_ready())
    await asyncio.sleep(0)

    await engine.close()

    with pytest.raises(EngineFailed, match="closed"):
        await waiting
    assert [link.stopped for link in workers.links] == [True] * start
    assert 1 == len(asyncio.all_tasks())


async def test_a_decoder_that_fails_ends_only_its_request(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A defect in reading the answer is an error of that request, and the worker goes on."""

    def fail(decoder: object, token_ids: object) -> str:
        raise RuntimeError("defect")

    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask())
        monkeypatch.setattr("app.engine.tokens.StreamDecoder.feed", fail)
        workers.newest.event(1, 5)

        with pytest.raises(AppError, match="decoded"):
            await reading
        assert [1] == workers.newest.cancelled
        assert EngineState.READY == engine.status().state
