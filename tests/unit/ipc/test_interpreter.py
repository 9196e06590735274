"""What shows from outside of a real process: one that computes, one that is stopped, one that is stuck."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from app.ipc.interpreter import Interpreter
from app.ipc.liveness import Liveness
from app.ipc.private_folder import PrivateFolder
from tests.waiting import until

ROOT = Path(__file__).parents[3]
BEAT = """
import ctypes, re, sys, threading, time
from app.worker.heartbeat import PROGRESS, beat
threading.Thread(target=beat, args=[1], daemon=True).start()
"""
COMPUTE_IN_ONE_CALL = "re.match('(a+)+$', 'a' * 60 + 'b')"
"""Never returns, and no other thread of the interpreter runs."""
WAIT_IN_ONE_CALL = "ctypes.PyDLL(None).sleep(60)"
"""The same without any use of the processor, as for a lock that nobody frees."""
WORK = "while True: time.sleep(0.01); PROGRESS.tick()"
REST = "time.sleep(60)"


@asynccontextmanager
async def interpreter(code: str) -> AsyncIterator[Interpreter]:
    """A process with a heartbeat that runs this code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", BEAT + code),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    interpreter = Interpreter(PrivateFolder(), process)
    try:
        await until(lambda: interpreter.pulse().beats > 0)
        yield interpreter
    finally:
        await interpreter.stop(0)
        assert not interpreter.folder.exists()


async def watch(interpreter: Interpreter, seconds: float) -> Liveness:
    """Look at a process for so long, as the supervisor does."""
    liveness = Liveness()
    for _ in range(int(seconds / 0.25)):
        liveness.observe(interpreter.pulse(), busy=True, seconds=0.25)
        await asyncio.sleep(0.25)
    return liveness


@pytest.mark.parametrize(
    ("code", "silent", "stuck"),
    [
        pytest.param(WORK, False, False, marks=pytest.mark.soak),
        pytest.param(REST, False, True, marks=pytest.mark.soak),
        pytest.param(
            COMPUTE_IN_ONE_CALL,
            False,
            True,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell CPU times"),
        ),
        (WAIT_IN_ONE_CALL, True, False),
    ],
    ids=["works", "rests", "computes in one call", "waits in one call"],
)
async def test_what_a_process_does_shows_in_its_pulse(code: str, silent: bool, stuck: bool) -> None:
    """A call that holds the interpreter must not look like death, and a heartbeat must not pass for work."""
    async with interpreter(code) as process:
        await asyncio.sleep(1.5)  # a beat may be on its way when the call begins
        liveness = await watch(process, 4)
        if silent and liveness.silent_seconds <= 2.5:  # on a busy machine it begins later
            liveness = await watch(process, 8)

    assert (silent, stuck) == (liveness.silent_seconds > 2.5, liveness.stalled_seconds > 2.5)


async def test_a_stopped_process_is_silent_until_it_is_continued() -> None:
    """Nothing reaches it but SIGCONT and SIGKILL."""
    async with interpreter(WORK) as process:
        os.kill(process.pid, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        assert (await watch(process, 3)).silent_seconds > 2

        os.kill(process.pid, signal.SIGCONT)
        await asyncio.sleep(1.5)
        assert (await watch(process, 3)).silent_seconds < 2


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_a_stop_that_is_cancelled_still_kills_and_removes_the_folder(cancellations: int) -> None:
    """As by a service whose second signal cuts its shutdown short."""
    async with interpreter(REST) as process:
        stopping = asyncio.create_task(process.stop(60))
        for _ in range(cancellations):
            await asyncio.sleep(0)
            stopping.cancel()
        await asyncio.wait([stopping])

        assert not process.folder.exists()
        assert -signal.SIGKILL == await process.wait()
        assert 0 == process.pulse().cpu_seconds


async def test_what_a_process_prints_is_not_taken_for_its_heartbeat(tmp_path: Path) -> None:
    """Libraries print; the worker's standard output is closed to them."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    process = await Interpreter.spawn(environment, spare=True)
    try:
        printed = Path(f"/proc/{process.pid}/fd/1")
        await until(lambda: printed.readlink() == Path(os.devnull))
        assert process.folder.stat().st_mode & 0o777 == 0o700
    finally:
        await process.stop(0)


SERVICE = """
import asyncio, os
from tests.waiting import until
from app.ipc.interpreter import Interpreter

async def main():
    interpreter = await Interpreter.spawn({"PYTHONPATH": os.environ["PYTHONPATH"]}, spare=True)
    while not interpreter.pulse().beats:
        await asyncio.sleep(0.01)
    print(interpreter.pid, interpreter.folder, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a stopped process that its parent has died")
@pytest.mark.parametrize("suspended", [False, True])
async def test_a_process_ends_with_its_service_even_if_it_is_suspended(suspended: bool) -> None:
    """And its folder goes too, before it was told what to load."""
    with tempfile.TemporaryDirectory() as temporary:
        service = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", SERVICE),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": temporary},
        )
        assert service.stdout is not None
        pid, folder = (await service.stdout.readline()).decode().split()
        if suspended:
            os.kill(int(pid), signal.SIGSTOP)

        service.kill()
        await service.wait()

        await until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie")
        await until(lambda: not Path(folder).exists())
