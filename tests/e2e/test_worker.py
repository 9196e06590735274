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
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.errors import DeadlineExceeded, EngineBusy, EngineFailed, EngineNotReady, InvalidRequest
from app.events import Event
from app.ipc.spare_interpreters import SpareInterpreters
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason, Message, Role, SamplingParams, Tenant
from tests.unit.event_streams import deltas_of, finished_of, text_of
from tests.unit.event_streams import read as read_stream
from tests.unit.ipc.priorities import hurry
from tests.unit.tiny_models import save_tiny_llama
from tests.waiting import HANG_SECONDS, START_SECONDS, until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


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


async def gone(pid: int, seconds: float = HANG_SECONDS) -> bool:
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

    async with asyncio.timeout(HANG_SECONDS):
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
    async with asyncio.timeout(HANG_SECONDS):
        assert FinishReason.LENGTH == finished_of([event async for event in second]).finish_reason


async def test_a_token_that_the_model_does_not_have_ends_only_its_request(engine: LocalEngine):
    """The client gets an error, the worker lives."""
    with pytest.raises(InvalidRequest, match="vocabulary"):
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

        async with asyncio.timeout(HANG_SECONDS):
            await read(engine, make_request(max_tokens=2))


async def test_a_killed_worker_fails_its_requests_at_once_and_comes_back(engine: LocalEngine):
    """Running and waiting requests fail at the death; a new process serves again."""
    streams = [engine.stream(make_request(name, 50_000)) for name in "ab"]
    for stream in streams:
        await anext(stream)
    await anext(streams[0])
    before = engine.status().worker_pid
    assert before is not None

    os.kill(before, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineFailed):
            await drain(stream)
    assert 0 == engine.status().restarts  # before there is another worker
    assert "SIGKILL" in str(engine.status().error)

    async with asyncio.timeout(START_SECONDS):
        await engine.wait_ready()
    assert (1, None) == (engine.status().restarts, engine.status().error)
    assert before != engine.status().worker_pid
    assert FinishReason.LENGTH == finished_of(await read(engine, make_request(max_tokens=2))).finish_reason


async def test_a_suspended_worker_tells_its_requests_and_serves_on_when_it_comes_back(engine: LocalEngine):
    """Within seconds running and waiting requests fail, new ones are refused; the same process then serves again."""
    streams = [engine.stream(make_request(name, 50_000)) for name in "ab"]
    for stream in streams:
        await anext(stream)
    await anext(streams[0])
    before = engine.status()
    assert before.worker_pid is not None

    os.kill(before.worker_pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(HANG_SECONDS):
            for stream in streams:
                with pytest.raises(EngineFailed, match="does not respond"):
                    await drain(stream)
        assert EngineState.UNRESPONSIVE == engine.status().state
        with pytest.raises(EngineNotReady) as refusal:
            await anext(engine.stream(make_request("c")))
        assert (refusal.value.retry_after or 0) > 0
    finally:
        os.kill(before.worker_pid, signal.SIGCONT)

    async with asyncio.timeout(HANG_SECONDS):
        await engine.wait_ready()
        # Its one slot is free: the worker has dropped what nobody waits for.
        assert FinishReason.LENGTH == finished_of(await read(engine, make_request(max_tokens=2))).finish_reason
    after = engine.status()
    assert (before.worker_pid, before.restarts, None) == (after.worker_pid, after.restarts, after.error)


async def test_a_worker_that_stays_suspended_is_replaced(folder: Path):
    """After the limit it is killed, though it had no work; its engine can be closed."""
    async with serving(LocalEngine(ModelConfig(name=str(folder)), DeadlineConfig(), hang_seconds=5)) as engine:
        pid = engine.status().worker_pid
        assert pid is not None

        os.kill(pid, signal.SIGSTOP)
        assert await gone(pid)

        await until(lambda: engine.status().state is EngineState.RESTARTING)
        assert "gave no sign of life" in str(engine.status().error)
    assert (EngineState.CLOSED, None) == (engine.status().state, engine.status().worker_pid)


@pytest.mark.soak
async def test_a_service_that_was_suspended_itself_does_not_blame_its_worker(folder: Path, short_folder: Path):
    """As a laptop whose lid was shut for longer than the limit."""
    with running_service(folder, short_folder) as service:
        pid = int(await line_of(service))
        assert "ready" == await line_of(service)
        service.send_signal(signal.SIGSTOP)
        await asyncio.sleep(7)
        service.send_signal(signal.SIGCONT)
        await asyncio.sleep(2)

        assert f"ready 0 {pid}" == await line_of(service, after=b"status\n")


async def test_closing_while_it_loads_leaves_nothing(
    engine: LocalEngine, folder: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """No process, no thread, no open file and no folder; this is the last test on the shared engine."""
    await engine.close()
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    gc.collect()
    files, threads = psutil.Process().num_fds(), own_threads()
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
    assert (files, threads) == (psutil.Process().num_fds(), own_threads())


def own_threads() -> int:
    """Return the number of threads, without those of the event loop's pool, which comes and goes by its own rules."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


async def test_a_model_that_is_not_there_is_a_failed_load(tmp_path: Path):
    """The reason reaches whoever waits for the engine."""
    engine = LocalEngine(ModelConfig(name=str(tmp_path / "nothing")), DeadlineConfig())
    await engine.start()

    async with asyncio.timeout(START_SECONDS):
        with pytest.raises(EngineFailed, match="there is no folder"):
            await engine.wait_ready()

    assert (EngineState.FAILED, None) == (engine.status().state, engine.status().worker_pid)
    await engine.close()


async def test_a_spare_replaces_a_killed_worker_and_ends_with_the_engine(folder: Path, short_folder: Path, monkeypatch):
    """The next worker is the process that waited with its imports done; the one after it is a new one."""
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    interpreters = SpareInterpreters()
    engine = LocalEngine(ModelConfig(name=str(folder)), DeadlineConfig(), interpreters=interpreters)
    async with serving(engine):
        for restarts in (1, 2):
            (spare,) = set(await interpreters_of(os.getpid(), 2)) - {engine.status().worker_pid}
            async with asyncio.timeout(START_SECONDS):
                while not interpreters.ready:  # another process' work
                    hurry(spare)
                    await asyncio.sleep(0.05)
            os.kill(engine.status().worker_pid or 0, signal.SIGKILL)
            await until(partial(lambda number: engine.status().restarts == number, restarts))
            async with asyncio.timeout(START_SECONDS):
                await engine.wait_ready()
            assert spare == engine.status().worker_pid
        assert FinishReason.LENGTH == finished_of(await read(engine, make_request(max_tokens=2))).finish_reason
        await interpreters_of(os.getpid(), 2)
        assert 2 == len(workers_in(short_folder))
    assert ([], []) == (await interpreters_of(os.getpid(), 0), workers_in(short_folder))


SERVICE = """
import asyncio, sys
from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from tests.waiting import HANG_SECONDS, until
from app.ipc.spare_interpreters import SpareInterpreters

async def main():
    interpreters = SpareInterpreters()
    engine = LocalEngine(ModelConfig(name=sys.argv[1]), DeadlineConfig(), interpreters=interpreters, hang_seconds=5)
    await engine.start()
    while engine.status().worker_pid is None:
        await asyncio.sleep(0.01)
    print(engine.status().worker_pid, flush=True)
    await engine.wait_ready()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(engine.status().state, engine.status().restarts, engine.status().worker_pid, flush=True)
    await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


@contextmanager
def running_service(folder: Path, temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with an engine, which is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as service:
        try:
            yield service
        finally:
            service.kill()


async def line_of(service: subprocess.Popen[bytes], after: bytes = b"") -> str:
    """Return the next line that the service prints, after it was sent one."""
    assert service.stdin is not None
    assert service.stdout is not None
    service.stdin.write(after)
    service.stdin.flush()
    return (await asyncio.to_thread(service.stdout.readline)).decode().strip()


async def interpreters_of(pid: int, count: int) -> list[int]:
    """Return the worker of a service, and its spare, once there are so many; a new process has no name at first."""

    def found() -> list[int]:
        return [each.pid for each in psutil.Process(pid).children() if "app.worker" in each.cmdline()]

    await until(lambda: len(found()) == count)
    return found()


def workers_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.glob("llm-worker-*")]


@pytest.mark.parametrize("state", ["while it loads", "when it serves", "while it is suspended"])
async def test_no_worker_outlives_its_service(folder: Path, short_folder: Path, state: str):
    """A service that is killed takes its worker and its spare with it, and the private folders too."""
    with running_service(folder, short_folder) as service:
        pid = int(await line_of(service))
        if state != "while it loads":
            assert "ready" == await line_of(service)
        interpreters = await interpreters_of(service.pid, 1 if state == "while it loads" else 2)
        children = psutil.Process(service.pid).children()
        assert pid in interpreters
        assert len(interpreters) == len(workers_in(short_folder))
        if state == "while it is suspended":
            for each in interpreters:
                # A process that is younger than this has not yet asked to be told of the death.
                process = psutil.Process(each)
                await until(partial(lambda process: process.cpu_times().user > 0.5, process), START_SECONDS)
            # All at once: a service soon kills a worker that is suspended alone.
            for each in interpreters:
                os.kill(each, signal.SIGSTOP)

        service.kill()

        for each in children:
            assert await gone(each.pid)
    assert [] == workers_in(short_folder)


async def test_what_a_killed_service_and_its_worker_left_is_swept_by_the_next(
    folder: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when the system runs out of memory, and kills both."""
    with running_service(folder, short_folder) as service:
        await line_of(service)
        assert "ready" == await line_of(service)
        for process in [*psutil.Process(service.pid).children(), psutil.Process(service.pid)]:
            process.suspend()
            process.kill()
    assert 2 == len(workers_in(short_folder))

    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    engine = LocalEngine(ModelConfig(name=str(folder)), DeadlineConfig())
    await engine.start()
    await worker_of(engine)

    assert 1 == len(workers_in(short_folder))
    await engine.close()
    assert [] == workers_in(short_folder)
