"""The life of a worker and of those that follow it: deaths, restarts, failed loads, the end."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.errors import (
    EngineFailed,
    EngineNotReady,
)
from app.ipc.messages import LoadFailed, Loading, Logged
from app.types import EngineState, FinishReason
from tests.unit.engine.fake_worker import TOKENIZER, FakeLink, FakeWorkers, begun, engine_on, make_request, read
from tests.unit.event_streams import finished_of
from tests.unit.tiny_models import save
from tests.waiting import HANG_SECONDS, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


async def test_a_dead_worker_fails_every_request_and_is_started_again(folder: Path):
    """The restart is counted, the cause stays visible until it serves again, and new requests complete."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        running, waiting = (
            await begun(engine, workers.newest, make_request("a")),
            asyncio.create_task(read(engine, make_request("b"))),
        )
        await until(lambda: engine.status().waiting == 1)
        workers.ready = False
        workers.newest.kill()
        for reading in (running, waiting):
            with pytest.raises(EngineFailed):
                await reading

        assert (EngineState.RESTARTING, "The fake worker is gone.") == (engine.status().state, engine.status().error)
        with pytest.raises(EngineNotReady):
            await read(engine, make_request("c"))
        await until(lambda: len(workers.links) == 2)
        workers.newest.say(workers.message)
        await engine.wait_ready()
        assert (EngineState.READY, 1, None) == (engine.status().state, engine.status().restarts, engine.status().error)
        assert workers.links[0].stopped


async def test_new_starts_come_ever_later(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The first comes at once; each further failure in a row doubles the pause, up to half a minute."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds >= 1:  # shorter ones are the watchdog's and this test's
            pauses.append(seconds)
        await sleep(0)

    workers = FakeWorkers(folder)
    async with engine_on(workers, backoff_seconds=1.0) as engine:
        monkeypatch.setattr("app.ipc.supervisor.asyncio.sleep", note)
        for number in range(1, 9):
            workers.ready = False
            workers.newest.say(LoadFailed("no memory"))
            await until(partial(lambda before: len(workers.links) > before, number))
        monkeypatch.undo()

        assert [1, 2, 4, 8, 16, 30, 30] == pauses
        assert (EngineState.RESTARTING, "no memory") == (engine.status().state, engine.status().error)


async def test_a_worker_that_served_for_a_while_is_replaced_soon(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A death now and then does not add up: the pause does not grow."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds >= 1:  # shorter ones are the watchdog's and this test's
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("app.ipc.supervisor.HEALTHY_SECONDS", 0)
    workers = FakeWorkers(folder)
    async with engine_on(workers, backoff_seconds=1.0) as engine:
        monkeypatch.setattr("app.ipc.supervisor.asyncio.sleep", note)
        for number in range(1, 7):
            workers.newest.kill()
            await until(partial(lambda before: engine.status().restarts == before, number))
            await engine.wait_ready()
        monkeypatch.undo()

    assert {1.0} >= set(pauses)


@pytest.mark.parametrize(
    "fail", [lambda link: link.say(LoadFailed("it is odd")), FakeLink.kill], ids=["reported", "died"]
)
async def test_a_model_that_never_loaded_is_given_up(folder: Path, fail: Callable[[FakeLink], None]):
    """Trying again would not help: who waits gets the reason, and nothing is started again."""
    workers = FakeWorkers(folder, ready=False)
    async with engine_on(workers) as engine:
        waiting = asyncio.create_task(engine.wait_ready())
        await until(lambda: len(workers.links) == 1)
        fail(workers.newest)

        with pytest.raises(EngineFailed, match=r"odd|gone"):
            await waiting
        assert EngineState.FAILED == engine.status().state
        with pytest.raises(EngineNotReady, match="could not be loaded"):
            await read(engine, make_request())
        assert 1 == len(workers.links)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(11, "Resource temporarily unavailable"), "temporarily unavailable"),
        (RuntimeError("a defect of ours"), "could not be started; the log says why"),
    ],
    ids=["system", "defect"],
)
async def test_a_process_that_cannot_be_started_is_a_failed_load(error: Exception, reason: str):
    """The system's reason reaches the operator, and nobody waits for a load that will not begin."""

    async def launch() -> FakeLink:
        raise error

    engine = LocalEngine(ModelConfig(), DeadlineConfig(), launch=launch)
    await engine.start()

    async with asyncio.timeout(HANG_SECONDS):
        with pytest.raises(EngineFailed, match=reason):
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
            await read(engine, make_request())
        assert (refusal.value.retry_after or 0) > 0


async def test_what_a_load_says_is_logged_at_its_own_level(folder: Path, caplog: pytest.LogCaptureFixture):
    workers = FakeWorkers(folder, ready=False)
    with caplog.at_level(logging.INFO):
        async with engine_on(workers):
            await until(lambda: len(workers.links) == 1)
            workers.newest.say(Logged(logging.INFO, "measured"))
            workers.newest.say(Logged(logging.WARNING, "a tensor too many"))
            await until(lambda: "a tensor too many" in caplog.messages)

    said = {record.message: record.levelno for record in caplog.records}
    assert (logging.INFO, logging.WARNING) == (said["measured"], said["a tensor too many"])


async def test_a_tokenizer_that_cannot_be_read_is_a_failed_load(tmp_path: Path):
    """The engine does not become ready without one."""
    engine = LocalEngine(ModelConfig(), DeadlineConfig(), launch=FakeWorkers(tmp_path))
    await engine.start()

    with pytest.raises(EngineFailed, match="tokenizer"):
        await engine.wait_ready()
    await engine.close()


async def test_a_worker_without_progress_is_ended(folder: Path):
    """Life without progress is a death if there is work to do, and rest if there is none."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, stall_seconds=0.1) as engine:
        await asyncio.sleep(0.3)
        assert 1 == len(workers.links)

        with pytest.raises(EngineFailed):
            await read(engine, make_request())
        assert "no progress for 0.1" in str(engine.status().error) or engine.status().state is EngineState.READY
        await until(lambda: len(workers.links) == 2)


async def test_a_request_that_nobody_reads_any_more_still_counts_as_work(folder: Path):
    """A worker that is stuck on a cancelled request is found out too."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, stall_seconds=0.1) as engine:
        stream = engine.stream(make_request())
        await anext(stream)
        await stream.aclose()

        await until(lambda: len(workers.links) == 2)


async def test_a_long_step_that_reports_its_parts_is_not_stuck(folder: Path):
    """A prefill of minutes sends no event; that its layers are computed one after the other is enough."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, stall_seconds=0.1) as engine:
        reading = await begun(engine, workers.newest, make_request())
        for _ in range(40):
            workers.newest.ticks += 1
            await asyncio.sleep(0.01)
        workers.newest.event(workers.newest.open[0], 5, finish="length")

        assert FinishReason.LENGTH == finished_of(await reading).finish_reason
        assert 1 == len(workers.links)


async def test_a_worker_without_a_sign_of_life_gets_no_requests_and_serves_again_when_it_comes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Running and waiting requests end with one error each, new ones are to come back later; nothing is restarted."""
    monkeypatch.setattr("app.ipc.supervisor.UNRESPONSIVE_SECONDS", 0.05)
    workers = FakeWorkers(folder)
    async with engine_on(workers, hang_seconds=20) as engine:
        worker = workers.newest
        running, waiting = (
            await begun(engine, worker, make_request("a")),
            asyncio.create_task(read(engine, make_request("b"))),
        )
        await until(lambda: engine.status().waiting == 1)

        worker.suspended = True
        for reading in (running, waiting):
            with pytest.raises(EngineFailed, match="does not respond") as failure:
                await reading
            assert (failure.value.retry_after or 0) > 0
        assert EngineState.UNRESPONSIVE == engine.status().state
        assert "no sign of life" in str(engine.status().error)
        with pytest.raises(EngineNotReady, match="does not respond") as refusal:
            await read(engine, make_request("c"))
        assert (refusal.value.retry_after or 0) > 0

        worker.suspended = False
        await engine.wait_ready()
        assert (EngineState.READY, None, 0) == (engine.status().state, engine.status().error, engine.status().restarts)
        assert worker.open == worker.cancelled
        for number in worker.cancelled:
            worker.event(number, finish="abort")
        again = await begun(engine, worker, make_request("d"))
        worker.event(worker.open[-1], 5, finish="length")
        assert FinishReason.LENGTH == finished_of(await again).finish_reason
        assert 1 == len(workers.links)
    assert ["no sign of life", "serves again"] == [
        next(part for part in ("no sign of life", "serves again", record.message) if part in record.message)
        for record in caplog.records
    ]


@pytest.mark.parametrize("loaded", [True, False], ids=["when it serves", "while it loads"])
async def test_a_worker_that_gives_no_sign_of_life_for_long_is_replaced(
    folder: Path, loaded: bool, caplog: pytest.LogCaptureFixture
):
    """Without work too: the next request should not be the one that finds out."""
    workers = FakeWorkers(folder)
    async with engine_on(workers, hang_seconds=0.2, stall_seconds=0.2) as engine:
        if not loaded:
            workers.ready = False
            workers.newest.kill()
            await until(lambda: len(workers.links) == 2)
            workers.ready = True
        before = len(workers.links)
        workers.newest.suspended = True

        await until(lambda: len(workers.links) == before + 1)
        await engine.wait_ready()
        assert workers.links[-2].stopped
    assert any("gave no sign of life for 0." in record.message for record in caplog.records)
    assert any("was replaced within" in record.message for record in caplog.records)


async def test_closing_ends_live_streams_and_is_final(folder: Path):
    """They end with ABORT, the worker gets a Shutdown, and later requests are refused."""
    workers = FakeWorkers(folder)
    async with engine_on(workers) as engine:
        reading = await begun(engine, workers.newest, make_request())
        await asyncio.gather(engine.close(), engine.close())
        await engine.close()
        await engine.start()

        assert FinishReason.ABORT == finished_of(await reading).finish_reason
        assert EngineState.CLOSED == engine.status().state
        assert workers.newest.stopped
        with pytest.raises(EngineNotReady):
            await read(engine, make_request())
        with pytest.raises(EngineFailed):
            await engine.wait_ready()
        assert 1 == len(asyncio.all_tasks())


@pytest.mark.parametrize("start", [True, False], ids=["while it loads", "before it starts"])
async def test_an_engine_without_a_model_closes_at_once(folder: Path, start: bool):
    """Nothing is left, and who waited for the model gets an error."""
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
