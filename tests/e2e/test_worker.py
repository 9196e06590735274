"""A real worker process: streams, hang-ups, deaths and the end of either side."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.errors import DeadlineExceeded, EngineBusy, EngineFailed, InvalidRequest
from app.events import Event
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason, Message, Role, SamplingParams, Tenant
from tests.unit.event_streams import deltas_of, finished_of, text_of
from tests.unit.event_streams import read as read_stream
from tests.unit.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

START_SECONDS = 110
"""Importing torch on a busy machine takes most of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=100_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[LocalEngine]:
    """One worker for all tests that leave it alive; they run in the order of the file, and the last ones end it."""
    config = ModelConfig(name=str(folder), max_waiting=1, max_batch_size=1)
    async with serving(LocalEngine(config, DeadlineConfig(), backoff_seconds=0.1, hang_seconds=20)) as engine:
        yield engine


@asynccontextmanager
async def serving(engine: LocalEngine) -> AsyncIterator[LocalEngine]:
    """Load the engine's model, and close the engine at the end."""
    await engine.start()
    try:
        async with asyncio.timeout(START_SECONDS):
            await engine.wait_ready()
        yield engine
    finally:
        await engine.close()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for sockets, whose addresses hold no more than 107 characters: `tmp_path` may be too long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def make_request(name: str = "one", max_tokens: int = 20, prompt: tuple[int, ...] = (5, 6, 7)) -> GenerationRequest:
    """A request that, if it is to take long, does not end by itself: the random model would, in half a second."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=max_tokens > 1000)
    return GenerationRequest(id=name, tenant=Tenant.owner("tenant"), prompt_ids=prompt, sampling=sampling)


async def read(engine: LocalEngine, request: GenerationRequest) -> list[Event]:
    return await read_stream(engine.stream(request))


async def drain(stream: AsyncIterator[Event]) -> None:
    """Read to the end, which may be an error."""
    async for _ in stream:
        pass


async def worker_of(engine: LocalEngine) -> int:
    """The process, as soon as there is one."""
    for _ in range(1000):
        pid = engine.status().worker_pid
        if pid is not None:
            return pid
        await asyncio.sleep(0.02)
    raise AssertionError("no worker was started")


async def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends within so many seconds."""
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True


async def test_a_model_answers_from_its_own_process(engine: LocalEngine):
    """Facts, tokenizer and answer come over the channel, and the API process has not imported the model."""
    ids = engine.tokenizer.encode_chat([Message(Role.USER, "hello")])

    events = await read(engine, make_request("chat", prompt=ids))

    assert ("batching", "cpu", "float32", 281) == (
        engine.info.engine,
        engine.info.device,
        engine.info.dtype,
        engine.info.vocab_size,
    )
    assert len(ids) == finished_of(events).usage.prompt_tokens
    status = engine.status()
    assert os.getpid() != status.worker_pid
    assert (status.worker_rss_bytes or 0) > 50_000_000


async def test_the_answer_does_not_depend_on_the_channel(engine: LocalEngine):
    """Twice the same request gives twice the same text, whole and token by token."""
    first, second = await read(engine, make_request()), await read(engine, make_request())

    assert text_of(first) == text_of(second)
    assert 20 == sum(delta.tokens for delta in deltas_of(first))


async def test_hanging_up_stops_the_worker(engine: LocalEngine):
    """The worker, which had thousands of tokens to generate, is free for the next request at once."""
    async with aclosing(engine.stream(make_request(max_tokens=50_000))) as stream:
        for _ in range(3):
            await anext(stream)
        assert 1 == engine.status().running
    assert 0 == engine.status().running

    async with asyncio.timeout(10):
        assert FinishReason.LENGTH == finished_of(await read(engine, make_request(max_tokens=2))).finish_reason


async def test_one_more_than_fits_is_refused(engine: LocalEngine):
    """One runs, one waits, the third is to come back later; the waiting one is served when its turn comes."""
    first, second = engine.stream(make_request("a", 50_000)), engine.stream(make_request("b", 2))
    await anext(first)
    await anext(first)
    await anext(second)
    with pytest.raises(EngineBusy):
        await anext(engine.stream(make_request("c")))
    assert (1, 1) == (engine.status().running, engine.status().waiting)

    await first.aclose()
    async with asyncio.timeout(10):
        assert FinishReason.LENGTH == finished_of([event async for event in second]).finish_reason


async def test_a_token_that_the_model_does_not_have_ends_only_its_request(engine: LocalEngine):
    """The client gets an error, the worker lives."""
    with pytest.raises(EngineFailed, match="vocabulary"):
        await read(engine, make_request(prompt=(10_000_000,)))
    with pytest.raises(InvalidRequest):
        await read(engine, make_request(prompt=()))

    assert (EngineState.READY, 0) == (engine.status().state, engine.status().restarts)


async def test_a_deadline_frees_the_worker(folder: Path):
    """A request over its time ends with DeadlineExceeded, and the next one does not wait for it."""
    config = ModelConfig(name=str(folder), max_batch_size=1)
    async with serving(LocalEngine(config, DeadlineConfig(total_seconds=1))) as engine:
        with pytest.raises(DeadlineExceeded):
            await read(engine, make_request(max_tokens=90_000))

        async with asyncio.timeout(10):
            await read(engine, make_request(max_tokens=2))


async def test_a_killed_worker_fails_its_requests_at_once_and_comes_back(engine: LocalEngine):
    """Running and waiting requests fail within half a second of the death; a new process serves again."""
    streams = [engine.stream(make_request(name, 50_000)) for name in "ab"]
    for stream in streams:
        await anext(stream)
    await anext(streams[0])
    before = engine.status().worker_pid
    assert before is not None

    os.kill(before, signal.SIGKILL)
    killed = time.monotonic()
    for stream in streams:
        with pytest.raises(EngineFailed):
            await drain(stream)
    assert time.monotonic() - killed < 0.5
    assert "SIGKILL" in str(engine.status().error)

    async with asyncio.timeout(START_SECONDS):
        await engine.wait_ready()
    assert (1, None) == (engine.status().restarts, engine.status().error)
    assert before != engine.status().worker_pid
    assert FinishReason.LENGTH == finished_of(await read(engine, make_request(max_tokens=2))).finish_reason


async def test_a_worker_that_hangs_is_ended(folder: Path):
    """A stopped process says nothing: after the limit it is killed, and its request fails; its engine can be closed."""
    async with serving(LocalEngine(ModelConfig(name=str(folder)), DeadlineConfig(), hang_seconds=1)) as engine:
        stream, pid = engine.stream(make_request(max_tokens=50_000)), engine.status().worker_pid
        assert pid is not None
        await anext(stream)
        await anext(stream)

        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(drain(stream), 20)

        assert "no progress" in str(engine.status().error)
        assert await gone(pid)
    assert (EngineState.CLOSED, None) == (engine.status().state, engine.status().worker_pid)


async def test_closing_while_it_loads_leaves_nothing(
    engine: LocalEngine, folder: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """No process, no thread, no open file and no folder; this is the last test on the shared engine."""
    await engine.close()
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    gc.collect()
    files, threads = psutil.Process().num_fds(), threading.active_count()
    lone = LocalEngine(ModelConfig(name=str(folder)), DeadlineConfig())
    await lone.start()
    pid = await worker_of(lone)
    (name,) = workers_in(short_folder)
    private = short_folder / name
    assert 0o700 == private.stat().st_mode & 0o777

    await lone.close()

    assert EngineState.CLOSED == lone.status().state
    assert await gone(pid)
    assert not private.exists()
    gc.collect()
    assert (files, threads) == (psutil.Process().num_fds(), threading.active_count())


async def test_a_model_that_is_not_there_is_a_failed_load(tmp_path: Path):
    """The reason reaches whoever waits for the engine."""
    engine = LocalEngine(ModelConfig(name=str(tmp_path / "nothing")), DeadlineConfig())
    await engine.start()

    async with asyncio.timeout(START_SECONDS):
        with pytest.raises(EngineFailed, match="there is no folder"):
            await engine.wait_ready()

    assert (EngineState.FAILED, None) == (engine.status().state, engine.status().worker_pid)
    await engine.close()


ORPHAN = """
import asyncio, sys
from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine

async def main():
    engine = LocalEngine(ModelConfig(name=sys.argv[1]), DeadlineConfig())
    await engine.start()
    while engine.status().worker_pid is None:
        await asyncio.sleep(0.01)
    print(engine.status().worker_pid, flush=True)
    await engine.wait_ready()
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def workers_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.glob("llm-worker-*")]


@pytest.mark.parametrize("loaded", [False, True], ids=["while it loads", "when it serves"])
async def test_no_worker_outlives_its_service(folder: Path, short_folder: Path, loaded: bool):
    """A service that is killed takes its worker with it, and the private folder too."""
    with subprocess.Popen(  # noqa: ASYNC220 - only its output is read, in a thread
        [sys.executable, "-c", ORPHAN, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(short_folder)},
    ) as service:
        try:
            assert service.stdout is not None
            pid = int(await asyncio.to_thread(service.stdout.readline))
            if loaded:
                assert "ready\n" == await asyncio.to_thread(service.stdout.readline)
            assert psutil.pid_exists(pid)
            assert 1 == len(workers_in(short_folder))
        finally:
            service.kill()

        assert await gone(pid)
        assert [] == workers_in(short_folder)
