"""Postgres that goes away under load, and commits of which nobody knows whether they arrived."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from app.access.database import Database
from app.access.tables import inference_log, usage_counters
from tests.services.cutting_proxy import CuttingProxy, cutting_proxy
from tests.services.postgres import Postgres
from tests.services.process import ServiceProcess, serving
from tests.waiting import until
from tests.web.access import ADMIN_KEY

BODY = {"prompt": "hello", "max_tokens": 9, "cache": False}


@dataclass
class Load:
    """What clients were told, by the name of the caller: one with a quota and one without."""

    key: str
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    last_refusal: float = 0.0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, service: ServiceProcess) -> None:
        callers = {"quota": self.key, "admin": ADMIN_KEY}
        async with service.client() as http:
            while not self.stopping.is_set():
                for name, key in callers.items():
                    self.note(name, await http.post("/v1/generate", json=BODY, headers={"X-API-Key": key}))

    def note(self, name: str, reply: httpx.Response) -> None:
        self.statuses[name, reply.status_code] += 1
        if reply.status_code == 200:
            self.requests[reply.json()["request_id"]] += 1
            self.tokens[name] += reply.json()["usage"]["total_tokens"]
        else:
            self.last_refusal = time.monotonic()
            assert reply.headers["Retry-After"]


async def stored(url: str) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """Return used and reserved of each key, and how often each answered request is in the log."""
    database = Database(url, wait_seconds=60)
    counters, log = usage_counters.c, inference_log.c
    async with database.read() as connection:
        rows = (await connection.execute(select(counters.key_id, counters.used, counters.reserved))).all()
        logged = (await connection.execute(select(log.request_id).where(log.status == 200))).scalars()
        requests = Counter(logged)
    await database.close()
    return {key_id: (used, reserved) for key_id, used, reserved in rows}, requests


async def nothing_reserved(url: str, key_id: str) -> None:
    """Wait until what was reserved in vain has ended with its lease."""
    async with asyncio.timeout(30):
        while (await stored(url))[0][key_id][1]:  # noqa: ASYNC110  # another process' work
            await asyncio.sleep(0.2)


async def quota_key(http: httpx.AsyncClient) -> str:
    created = await http.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})
    key: str = created.json()["key"]
    return key


@pytest.mark.services
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cuts", [5, pytest.param(200, marks=pytest.mark.chaos)])
async def test_a_commit_whose_reply_is_lost_counts_once(
    postgres: Postgres, postgres_url: str, tmp_path: Path, cuts: int
):
    """Of charges, reservations and rows of the log alike, each was done on the server when its connection broke."""
    async with cutting_proxy(postgres.port) as proxy:
        url = postgres_url.replace(str(postgres.port), str(proxy.port))
        async with serving(url, tmp_path, QUOTA__LEASE_SECONDS="2") as service, service.client() as http:
            load = Load(await quota_key(http))
            clients = [asyncio.create_task(load.run(service)) for _ in range(4)]
            for number in range(cuts):
                # Each second one of the log's, which writes seldom.
                await cut_one(proxy, b"/v1/generate" if number % 2 else b"")
                await asyncio.sleep(random.uniform(0, 0.2) if number % 3 else 1.2)
            load.stopping.set()
            await asyncio.gather(*clients)
            key_id = load.key.split("_")[1]
            await nothing_reserved(postgres_url, key_id)
            assert 0 == await asyncio.to_thread(service.stop)
    counters, logged = await stored(postgres_url)

    assert cuts == proxy.cut
    assert {200, 503} >= {status for _, status in load.statuses}
    assert load.statuses["quota", 200] > cuts
    assert 0 == load.statuses["admin", 503]
    assert (load.tokens["quota"], 0) == counters[key_id]
    assert load.tokens["admin"] == counters["admin"][0]
    assert load.requests == logged


async def cut_one(proxy: CuttingProxy, of: bytes) -> None:
    wanted = proxy.cut + 1
    proxy.of, proxy.cuts = of, 1
    await until(lambda: proxy.cut == wanted)


@pytest.mark.services
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "outages", [pytest.param(1, marks=pytest.mark.soak), pytest.param(20, marks=pytest.mark.chaos)]
)
async def test_postgres_may_go_and_come_back_under_load(
    postgres: Postgres, postgres_url: str, tmp_path: Path, outages: int
):
    """No 500; within five seconds of its return everybody is served; nothing is lost or counted twice."""
    took = []
    async with serving(postgres_url, tmp_path, QUOTA__LEASE_SECONDS="2") as service, service.client() as http:
        load = Load(await quota_key(http))
        clients = [asyncio.create_task(load.run(service)) for _ in range(4)]
        for _ in range(outages):
            await asyncio.sleep(random.uniform(0.5, 1.5))
            await asyncio.to_thread(postgres.stop)
            await asyncio.sleep(random.uniform(0.2, 3))
            await asyncio.to_thread(postgres.start)
            back = time.monotonic()
            await asyncio.sleep(5.5)
            took.append(load.last_refusal - back)
        load.stopping.set()
        await asyncio.gather(*clients)
        key_id = load.key.split("_")[1]
        await nothing_reserved(postgres_url, key_id)
        assert 0 == await asyncio.to_thread(service.stop)
    counters, logged = await stored(postgres_url)

    assert {200, 503} >= {status for _, status in load.statuses}
    assert load.statuses["quota", 503] > 0 == load.statuses["admin", 503]
    assert max(took) < 5
    assert (load.tokens["quota"], 0) == counters[key_id]
    assert load.tokens["admin"] == counters["admin"][0]
    assert load.requests == logged
