"""Quotas on both databases: never more than the limit, whoever asks, stops or dies."""

import asyncio
from datetime import UTC, datetime

import pytest

from app.access.db import Database
from app.access.ledger import Month, standing
from app.access.quotas import Quotas, month_of
from app.config import QuotaConfig
from app.errors import QuotaExceeded
from app.types import Limits, Principal

CALLER = Principal("key", "tenant", limits=Limits(monthly_tokens=1000))
REPLICAS, WORKERS = 4, 64


async def stands(database: Database) -> tuple[int, int]:
    found = await standing(database, Month("key", month_of(datetime.now(UTC))))
    return found.used, found.reserved


@pytest.mark.timeout(300)
@pytest.mark.parametrize("attempts", [20, pytest.param(1000, marks=pytest.mark.soak)])
async def test_many_workers_of_several_replicas_are_granted_exactly_the_limit(
    url: str, database: Database, attempts: int
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
                await quotas.settle(reservation, 1)
        return granted

    for quotas in replicas:
        await quotas.start()
    granted = await asyncio.gather(*(work(replicas[number % REPLICAS]) for number in range(WORKERS)))
    for quotas, other in zip(replicas, others, strict=True):
        await quotas.close()
        await other.close()

    assert 1000 == sum(granted)
    assert 1000 == sum(await stands(database))
