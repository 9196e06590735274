"""The circuit breaker: when nobody waits for the database any more, and when everybody does again."""

import asyncio
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from app.access.background import BackgroundGroup
from app.access.circuit_breaker import CircuitBreaker
from app.access.database import Database
from app.access.faults import Fault
from app.errors import StoreUnavailable
from tests.waiting import until


class Probe:
    """A database that is away as long as `away` says."""

    def __init__(self) -> None:
        self.count = 0
        self.away = True

    async def __call__(self) -> None:
        self.count += 1
        if self.away:
            raise StoreUnavailable()


def state(breaker: CircuitBreaker) -> tuple[bool, bool]:
    return breaker.open, breaker.degraded


def test_giving_up_early_warns_those_with_a_fallback_only():
    """Who would have to refuse a request still waits for the database's own time."""
    breaker = CircuitBreaker(Probe())

    assert (False, False) == state(breaker)
    breaker.slow()
    assert (False, True) == state(breaker)
    breaker.trip()
    assert (True, True) == state(breaker)
    breaker.reset()
    assert (False, False) == state(breaker)


def test_a_fault_of_writing_leaves_readers_alone_and_ends_with_a_write():
    """Where nothing answers at all, the first success of any kind ends it."""
    breaker = CircuitBreaker(Probe())

    breaker.trip(Fault.FULL)
    assert (True, False) == state(breaker)
    breaker.reset(wrote=False)
    assert (True, False, Fault.FULL) == (*state(breaker), breaker.fault)
    breaker.slow()
    breaker.reset(wrote=False)
    assert (True, False) == state(breaker)
    breaker.trip(Fault.UNREACHABLE)
    breaker.reset(wrote=False)
    assert (False, False, None) == (*state(breaker), breaker.fault)


async def test_a_closed_breaker_probes_nothing_and_an_open_one_until_the_database_is_back(background: BackgroundGroup):
    probe = Probe()
    breaker = CircuitBreaker(probe, probe_seconds=0.01)
    background.spawn(breaker.watch())
    await asyncio.sleep(0.05)
    assert 0 == probe.count

    breaker.slow()
    await until(lambda: probe.count > 2)
    assert (True, True) == state(breaker)
    probe.away = False
    await until(lambda: not breaker.degraded)
    count = probe.count
    await asyncio.sleep(0.05)

    assert not breaker.open
    assert count == probe.count


async def wait_for(database: Database, *, seconds: float) -> None:
    async with database.read(seconds) as connection:
        await asyncio.sleep(0.05)
        await connection.execute(text("SELECT 1"))


async def test_a_database_reports_to_its_breaker_how_transactions_end(tmp_path: Path):
    """A reader's short patience is no outage; a writer that never gets its turn is one for writers, until the next that
    does: that others can read ends nothing."""
    path = tmp_path / "service.db"
    database = Database(f"sqlite:///{path}", wait_seconds=0.3)
    await database.migrate()
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")

    with pytest.raises(StoreUnavailable):
        await wait_for(database, seconds=0.001)
    impatient = state(database.breaker)
    with pytest.raises(StoreUnavailable):
        async with database.begin():
            pass
    stalled = state(database.breaker)
    await wait_for(database, seconds=5)
    read = state(database.breaker)
    blocker.execute("ROLLBACK")
    blocker.close()
    async with database.begin():
        pass
    back = state(database.breaker)
    await database.close()

    assert [(False, True), (True, False), (True, False), (False, False)] == [impatient, stalled, read, back]
