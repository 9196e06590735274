"""Spare interpreters: which one the next worker gets, and that none is left."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from app.ipc.interpreter import Interpreter
from app.ipc.liveness import HEARTBEAT_SECONDS
from app.ipc.spare_interpreters import SpareInterpreters
from tests.unit.ipc.priorities import hurry
from tests.waiting import until

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of the service, with a process's folder for each process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest_asyncio.fixture
async def taken() -> AsyncIterator[list[Interpreter]]:
    """Interpreters that a test took, which are stopped at the end."""
    interpreters: list[Interpreter] = []
    yield interpreters
    for each in interpreters:
        await each.stop(0)


async def take(spares: SpareInterpreters, taken: list[Interpreter], **more: str) -> int:
    """Take one, and stop what it does: its imports are of no use here, and take seconds."""
    taken.append(await spares.take({**ENVIRONMENT, **more}))
    os.kill(taken[-1].pid, signal.SIGSTOP)
    return taken[-1].pid


async def imported(spares: SpareInterpreters, spare: int) -> None:
    """Wait until a spare is ready."""

    def is_ready() -> bool:
        hurry(spare)
        return spares.ready == 1

    await until(is_ready, seconds=100)


def folders_in(temporary: Path) -> list[Path]:
    return list(temporary.glob("llm-worker-*"))


def children() -> set[int]:
    """Return the interpreters among the processes that this one has started, and not those that other tests left."""
    return {
        each.pid
        for each in psutil.Process().children()
        if str(tempfile.gettempdir()) in " ".join(each.cmdline()) and each.status() != psutil.STATUS_ZOMBIE
    }


async def test_a_spare_serves_the_environment_that_it_was_made_for(taken: list[Interpreter]):
    """Another one holds another token or reaches the hub, which cannot be changed later."""
    spares = SpareInterpreters()
    await spares.open()
    first = await take(spares, taken)
    await spares.prepare()
    (spare,) = children() - {first}
    await imported(spares, spare)

    other = await take(spares, taken, HF_TOKEN="t")
    again = await take(spares, taken)

    assert (spare, True) == (again, other not in (first, spare))
    await spares.close()


async def test_a_spare_that_still_imports_is_left_to_it(taken: list[Interpreter]):
    """It does so at the lowest priority, and on a busy machine a worker that is waited for would wait for minutes."""
    spares = SpareInterpreters()
    await spares.open()
    first = await take(spares, taken)
    await spares.prepare()
    (spare,) = children() - {first}

    other = await take(spares, taken)
    await imported(spares, spare)

    assert (other not in (first, spare), spare) == (True, await take(spares, taken))
    await spares.close()


async def test_a_spare_that_shows_no_sign_of_life_is_not_used(taken: list[Interpreter]):
    """The next worker would only hang in its place."""
    spares = SpareInterpreters()
    await spares.open()
    first = await take(spares, taken)
    await spares.prepare()
    (spare,) = children() - {first}
    os.kill(spare, signal.SIGSTOP)
    await asyncio.sleep(4 * HEARTBEAT_SECONDS)

    assert await take(spares, taken) not in (first, spare)
    assert spare not in children()
    await spares.close()


async def test_the_last_engine_that_closes_ends_the_spares(taken: list[Interpreter], temporary: Path):
    """With their folders; what a late load would want after that is not started."""
    spares = SpareInterpreters()
    for _ in range(2):
        await spares.open()
    first = await take(spares, taken)
    await spares.prepare()
    await spares.close()
    assert 2 == len(children())

    await spares.close()
    await spares.prepare()

    assert ({first}, 1) == (children(), len(folders_in(temporary)))


async def test_without_spares_nothing_waits(taken: list[Interpreter]):
    """`model.spare_worker: false` costs no memory."""
    spares = SpareInterpreters(enabled=False)
    await spares.open()
    first = await take(spares, taken)

    await spares.prepare()

    assert {first} == children()
    await spares.close()


async def test_a_spare_that_cannot_be_started_is_only_logged(
    taken: list[Interpreter], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The model serves all the same; without a temporary directory, a new worker is an error that says so."""
    spares = SpareInterpreters()
    await spares.open()
    await take(spares, taken)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")

    await spares.prepare()

    assert ["no spare interpreter could be started: No such file or directory"] == [
        record.message for record in caplog.records
    ]
    with pytest.raises(OSError, match="nowhere"):
        await spares.take(ENVIRONMENT)
    await spares.close()
