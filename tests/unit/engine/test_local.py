"""What becomes of each request, with a worker that does what the test says."""

import asyncio
from pathlib import Path

import pytest

from app.config import DeadlineConfig
from app.engine.base import Chunk, GenerationRequest
from app.errors import (
    AppError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    InvalidRequest,
)
from app.types import EngineState, FinishReason, Usage
from tests.unit.engine.fake_worker import (
    TOKENIZER,
    FakeWorkers,
    ask,
    begun,
    collect,
    engine_on,
    tokens,
    until,
)
from tests.unit.tiny_models import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


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


async def test_a_decoder_that_fails_ends_only_its_request(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A defect in reading the answer is an error of that request, and the worker goes on."""

    def fail(decoder: object, token_ids: object) -> str:
        raise RuntimeError("defect")

    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, ask())
        monkeypatch.setattr("app.engine.tokenizer.hf_tokenizer.StreamDecoder.feed", fail)
        workers.newest.event(1, 5)

        with pytest.raises(AppError, match="decoded"):
            await reading
        assert [1] == workers.newest.cancelled
        assert EngineState.READY == engine.status().state
