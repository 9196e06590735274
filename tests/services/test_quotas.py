"""Quotas on both databases: never more than the limit, whoever asks, stops or dies."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import IntegrityError

from app.access import ledger
from app.access.background import BackgroundGroup
from app.access.database import Database
from app.access.ledger import Month, balance
from app.access.quotas import Quotas, month_of, next_month
from app.access.tables import reservations
from app.config import QuotaConfig
from app.errors import QuotaExceeded
from app.types import Limits, Principal, Tenant
from tests.waiting import HANG_SECONDS

CALLER = Principal("key", Tenant.owner("tenant"), limits=Limits(monthly_tokens=1000))
REPLICAS, WORKERS = 4, 64


async def stands(database: Database) -> tuple[int, int]:
    found = await balance(database, Month("key", month_of(datetime.now(UTC))))
    return found.used, found.reserved


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attempts", [20, pytest.param(1000, marks=pytest.mark.soak)])
async def test_many_workers_of_several_replicas_are_granted_exactly_the_limit(
    url: str, database: Database, background: BackgroundGroup, attempts: int
):
    """64 workers, 16 in each of four replicas with connections of their own, try so often each for one token."""
    others = [Database(url) for _ in range(REPLICAS)]
    replicas = [Quotas(each, QuotaConfig()) for each in others]

    async def work(quotas: Quotas) -> int:
        granted = 0
        for _ in range(attempts):
            try:
                reservation = await quotas.reserve(CALLER, 1)
            except QuotaExceeded:
                continue
            assert reservation is not None
            granted += 1
            if granted % 2:
                await quotas.commit(reservation, 1)
        return granted

    for quotas in replicas:
        quotas.start(background)
    granted = await asyncio.gather(*(work(replicas[number % REPLICAS]) for number in range(WORKERS)))
    for quotas, other in zip(replicas, others, strict=True):
        await quotas.close()
        await other.close()

    assert 1000 == sum(granted)
    assert 1000 == sum(await stands(database))


async def test_a_commit_that_is_tried_again_counts_once(database: Database):
    """After a lost connection nobody knows whether the commit arrived; one whose lease has ended counts too."""
    counter = Month("key", "2026-11")
    far = datetime(2030, 1, 1, tzinfo=UTC)
    order = ledger.Reserve(id="r", counter=counter, tokens=500, limit=1000, expires=far)
    commit = ledger.Commit(id="r", counter=counter, tokens=30)
    late = ledger.Commit(id="gone", counter=counter, tokens=7)

    await database.run_in_transaction(partial(ledger.reserve, order=order))
    reserved = await balance(database, counter)
    for again in (False, True, True):
        await database.run_in_transaction(partial(ledger.commit, order=commit, again=again))
    await database.run_in_transaction(partial(ledger.commit, order=late))

    assert (0, 500) == (reserved.used, reserved.reserved)
    committed = await balance(database, counter)
    assert (37, 0) == (committed.used, committed.reserved)


async def test_a_commit_that_is_tried_again_after_its_lease_counts(database: Database):
    """The lease was released by another replica while the database was away for this one; only once all the same."""
    counter, now = Month("key", "2026-11"), datetime(2026, 11, 30, tzinfo=UTC)
    order = ledger.Reserve(id="r", counter=counter, tokens=500, limit=1000, expires=now)
    commit = ledger.Commit(id="r", counter=counter, tokens=30)
    later = now + timedelta(minutes=1)

    await database.run_in_transaction(partial(ledger.reserve, order=order))
    released = [await database.run_in_transaction(partial(ledger.release_expired, now=later)) for _ in range(2)]
    freed = await balance(database, counter)
    for _ in range(3):
        await database.run_in_transaction(partial(ledger.commit, order=commit, again=True))
    committed = await balance(database, counter)

    assert [1, 0] == released
    assert (0, 0) == (freed.used, freed.reserved)
    assert (30, 0) == (committed.used, committed.reserved)


async def test_what_the_ledger_remembers_it_forgets_in_time(database: Database):
    """Attempts, and reservations that were released: a day later nobody tries again."""
    now = datetime(2026, 11, 30, tzinfo=UTC)
    order = ledger.Reserve(id="r", counter=Month("key", "2026-11"), tokens=5, limit=1000, expires=now)
    await database.run_in_transaction(partial(ledger.reserve, order=order))
    await database.run_in_transaction(partial(ledger.begin_attempt, attempt_id="a", now=now))

    for later in (timedelta(minutes=1), timedelta(days=1, minutes=2)):
        await database.run_in_transaction(partial(ledger.release_expired, now=now + later))

    async with database.read() as connection:
        assert 0 == await connection.scalar(select(func.count()).select_from(reservations))


async def test_whether_a_transaction_was_committed_is_known_and_stays_so(database: Database):
    """One that was not can no longer be: its own id would stand in its way."""
    now = datetime.now(UTC)
    await database.run_in_transaction(partial(ledger.begin_attempt, attempt_id="done", now=now))

    known = [
        await database.run_in_transaction(partial(ledger.was_applied, attempt_id=each, now=now))
        for each in ("done", "not")
    ]
    with pytest.raises(IntegrityError):
        await database.run_in_transaction(partial(ledger.begin_attempt, attempt_id="not", now=now))
    again = [
        await database.run_in_transaction(partial(ledger.was_applied, attempt_id=each, now=now))
        for each in ("done", "not")
    ]

    assert [True, False] == known == again


async def test_a_charge_is_on_the_disk_before_it_is_acknowledged(
    sqlite_url: str, background: BackgroundGroup, monkeypatch: pytest.MonkeyPatch
):
    """A power cut takes no charge back, nor a key; a reservation, which dies with its process, waits for no disk."""
    database, seen = Database(sqlite_url), []
    await database.migrate()
    quotas = Quotas(database, QuotaConfig())

    def spy(name: str) -> None:
        real = getattr(ledger, name)

        def call(connection: Connection, *args: Any, **options: Any) -> Any:
            seen.append((name, connection.exec_driver_sql("PRAGMA synchronous").scalar()))
            return real(connection, *args, **options)

        monkeypatch.setattr(ledger, name, call)

    spy("reserve")
    spy("commit")
    quotas.start(background)
    held = await quotas.reserve(CALLER, 10)
    assert held is not None
    await quotas.commit(held, 10)
    await quotas.close()
    async with database.begin() as connection:
        ordinary = await connection.scalar(text("PRAGMA synchronous"))
    await database.close()

    normal, full = 1, 2
    assert [("reserve", normal), ("commit", full)] == seen
    assert full == ordinary


async def test_an_answer_counts_for_the_month_in_which_it_began(database: Database, background: BackgroundGroup):
    """Let in a moment before midnight UTC and committed after it; the new month begins with nothing used."""
    moments = [datetime(2026, 11, 30, 23, 59, 59, 900_000, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)]
    clock = iter(moments)
    quotas = Quotas(database, QuotaConfig(), now=lambda: next(clock))
    quotas.start(background)
    old = await quotas.reserve(CALLER, 1000)
    new = await quotas.reserve(CALLER, 1000)
    assert old is not None
    assert new is not None
    await quotas.commit(old, 10)
    await quotas.commit(new, 20)
    await quotas.close()

    stood = [await balance(database, Month("key", month)) for month in ("2026-11", "2026-12")]
    assert [(10, 0), (20, 0)] == [(each.used, each.reserved) for each in stood]
    assert moments[1] == next_month(moments[0])
    assert datetime(2027, 1, 1, tzinfo=UTC) == next_month(moments[1])


async def test_a_limit_that_is_lowered_below_what_is_used_refuses(database: Database, background: BackgroundGroup):
    """And a refusal leaves nothing behind."""
    quotas = Quotas(database, QuotaConfig())
    quotas.start(background)
    held = await quotas.reserve(CALLER, 900)
    assert held is not None
    await quotas.commit(held, 900)

    with pytest.raises(QuotaExceeded) as refused:
        await quotas.reserve(Principal("key", Tenant.owner("tenant"), limits=Limits(monthly_tokens=500)), 1)
    await quotas.close()

    assert (500, 900, 1) == tuple(refused.value.details[name] for name in ("limit", "used", "requested"))
    assert (900, 0) == await stands(database)


async def test_a_lost_commit_frees_what_was_reserved(
    database: Database, background: BackgroundGroup, monkeypatch: pytest.MonkeyPatch
):
    """Its lease is no longer renewed, though this process lives on."""
    quotas = Quotas(database, QuotaConfig(lease_seconds=1))
    quotas.start(background)
    held = await quotas.reserve(CALLER, 900)
    assert held is not None

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "commit", fail)
        await quotas.commit(held, 10)
    async with asyncio.timeout(HANG_SECONDS):
        while await stands(database) != (0, 0):  # noqa: ASYNC110  # leases have no event
            await asyncio.sleep(0.05)
    await quotas.close()


async def test_a_defect_in_renewing_leases_ends_nothing_else(
    database: Database, background: BackgroundGroup, monkeypatch: pytest.MonkeyPatch
):
    """The next turn is tried, and tokens are reserved and committed as before."""
    quotas = Quotas(database, QuotaConfig(lease_seconds=0.2))
    turns: list[None] = []

    def fail(*_: object, **__: object) -> None:
        turns.append(None)
        raise ValueError("a defect")

    monkeypatch.setattr(ledger, "renew", fail)
    quotas.start(background)
    async with asyncio.timeout(HANG_SECONDS):
        while len(turns) < 2:  # noqa: ASYNC110  # turns have no event
            await asyncio.sleep(0.01)
    held = await quotas.reserve(CALLER, 900)
    assert held is not None
    await quotas.commit(held, 10)
    await quotas.close()

    assert (10, 0) == await stands(database)


async def test_who_leaves_while_tokens_are_reserved_holds_none(database: Database, background: BackgroundGroup):
    """Whatever the moment; long before any lease ends."""
    quotas = Quotas(database, QuotaConfig())
    quotas.start(background)
    for moment in range(40):
        leaving = asyncio.create_task(quotas.reserve(CALLER, 10))
        await asyncio.sleep(0.0001 * moment)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            held = await leaving
            assert held is not None
            await quotas.commit(held, 0)
    async with asyncio.timeout(HANG_SECONDS):
        while await stands(database) != (0, 0):  # noqa: ASYNC110  # the writer's work has no event
            await asyncio.sleep(0.01)
    await quotas.close()

    assert (0, 0) == await stands(database)


async def test_what_only_running_requests_hold_back_may_come_again_soon(
    database: Database, background: BackgroundGroup
):
    """And what the month has not left comes with the next one."""
    quotas = Quotas(database, QuotaConfig())
    quotas.start(background)
    running = await quotas.reserve(CALLER, 900)
    assert running is not None

    with pytest.raises(QuotaExceeded, match="requests that run now have reserved 900") as soon:
        await quotas.reserve(CALLER, 200)
    await quotas.commit(running, 900)
    with pytest.raises(QuotaExceeded, match="wait for the next month") as next_month:
        await quotas.reserve(CALLER, 200)

    assert (1.0, 900) == (soon.value.retry_after, soon.value.details["reserved"])
    assert (next_month.value.retry_after or 0) > 1
