"""The service killed under load: what it has acknowledged is there afterwards, on both databases."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from app.access.database import Database
from app.access.ledger import Month, balance, release_expired
from app.access.quotas import month_of
from app.access.tables import api_keys, inference_log, reservations
from tests.services.process import FLUSH_SECONDS, serving

SLACK_SECONDS = 0.5
"""On a busy machine the log's task may come late to its turn."""


@dataclass
class Acknowledged:
    """What clients were acknowledged before the service died."""

    keys: list[str] = field(default_factory=list)
    tokens: int = 0
    answers: list[tuple[float, str]] = field(default_factory=list)
    """When each arrived, and its request id."""


async def load(http: httpx.AsyncClient, key: str, acknowledged: Acknowledged) -> None:
    """Send prompts and create keys until the service is gone."""
    while True:
        try:
            created = await http.post("/v1/keys", json={"role": "free"})
            acknowledged.keys += [created.json()["id"]] if created.status_code == 201 else []
            for _ in range(3):
                body = {"prompt": "hello", "max_tokens": 9, "cache": False}
                reply = await http.post("/v1/generate", json=body, headers={"X-API-Key": key})
                if reply.status_code == 503:  # a machine this busy: nothing was acknowledged
                    continue
                acknowledged.tokens += reply.json()["usage"]["total_tokens"]
                acknowledged.answers.append((time.monotonic(), reply.json()["request_id"]))
        except httpx.TransportError:
            return


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [1, pytest.param(25, marks=pytest.mark.soak)])
async def test_a_killed_service_has_lost_nothing_that_it_acknowledged(url: str, tmp_path: Path, kills: int):
    """Keys, tokens, and log rows but those of the last flush interval; leases free what was reserved."""
    acknowledged, key = Acknowledged(), ""
    for _ in range(kills):
        async with serving(url, tmp_path) as service, service.client() as http:
            if not key:
                created = await http.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})
                key = created.json()["key"]
            clients = [asyncio.create_task(load(http, key, acknowledged)) for _ in range(8)]
            await asyncio.sleep(random.uniform(0.8, 2))
            service.process.kill()
            killed = time.monotonic()
            await asyncio.gather(*clients)
        await look(url, key, acknowledged, killed - FLUSH_SECONDS - SLACK_SECONDS)
    assert len(acknowledged.answers) > 10 * kills
    await leases_free_the_rest(url, key)


async def look(url: str, key: str, acknowledged: Acknowledged, safe_until: float) -> None:
    """Find in the database what was acknowledged."""
    database = Database(url, wait_seconds=60)
    async with database.begin() as connection:
        keys = set((await connection.execute(select(api_keys.c.id))).scalars())
        rows = set((await connection.execute(select(inference_log.c.request_id))).scalars())
    counted = await balance(database, counter(key))
    problems = await database.problems()
    await database.close()

    assert set() == set(acknowledged.keys) - keys
    assert counted.used >= acknowledged.tokens
    assert set() == {request_id for arrived, request_id in acknowledged.answers if arrived < safe_until} - rows
    assert [] == problems
    # Those of the last interval may be lost; the next round must not look for them again.
    acknowledged.answers = [(arrived, request_id) for arrived, request_id in acknowledged.answers if request_id in rows]


def counter(key: str) -> Month:
    return Month(key.split("_")[1], month_of(now()))


async def leases_free_the_rest(url: str, key: str) -> None:
    """Two minutes on, nothing is reserved any more."""
    database = Database(url, wait_seconds=60)
    later = now() + timedelta(minutes=2)
    await database.run_in_transaction(lambda connection: release_expired(connection, later))
    left = await balance(database, counter(key))
    async with database.begin() as connection:
        assert 0 == await connection.scalar(select(func.count()).where(reservations.c.tokens > 0))
    await database.close()

    assert 0 == left.reserved


def now() -> datetime:
    return datetime.now(UTC)
