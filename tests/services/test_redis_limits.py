"""Limits that several replicas share over a real Redis, and what each grants while that is away."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.access.admission_store import Rates, Refusal
from app.access.token_bucket import Bucket
from app.stores.memory_admission import MemoryAdmissionStore
from app.stores.redis_admission import AdmissionStoreWithFallback, RedisAdmissionStore
from app.stores.redis_connection import RedisConnection
from tests.services.process import ROOT
from tests.services.redis_connections import wait_longer
from tests.services.redis_race import LIMIT, patient
from tests.services.redis_server import RedisServer
from tests.services.slow_proxy import slow_proxy
from tests.waiting import HANG_SECONDS, until
from tests.web.access import Running, running

pytestmark = pytest.mark.services

TOKENS = Bucket(capacity=300, per_second=1e-6)


@asynccontextmanager
async def replicas(
    redis: RedisServer, folder: Path, count: int = 2, /, **sections: Any
) -> AsyncIterator[list[Running]]:
    """Several services over one database and one Redis."""
    given: dict[str, Any] = {
        "database": {"url": f"sqlite:///{folder / 'service.db'}"},
        "redis": {"url": redis.url, "probe_seconds": 0.05, "replicas": count},
    }
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running(folder / str(number), **(given | sections)))
            for number in range(count)
        ]


async def statuses(replica: Running, key: str, count: int) -> list[int]:
    return [(await replica.generate(key)).status_code for _ in range(count)]


async def state(replica: Running) -> tuple[str, str, bool]:
    """Return what /status says of Redis and of the limits, and what the metrics say."""
    async with replica.client() as http:
        status = (await http.get("/status")).json()
        metrics = (await http.get("/metrics")).text
    return status["redis"], status["rate_limits"], "ratelimit_degraded 1.0" in metrics


async def stores(stack: AsyncExitStack, *urls: str, lease_seconds: float = 20) -> list[RedisAdmissionStore]:
    """Return the stores of as many processes."""
    opened = []
    for url in urls:
        connection = RedisConnection(patient(url))
        stack.push_async_callback(connection.close)
        opened.append(RedisAdmissionStore(connection, lease_seconds=lease_seconds))
    return opened


def test_three_processes_in_a_race_admit_exactly_what_the_limit_allows(redis: RedisServer):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.services.redis_race", redis.url, "250"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert "ready\n" == process.stdout.readline()
        admitted = [int(process.communicate("go\n", timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)

    assert LIMIT == sum(admitted)


async def test_replicas_share_every_limit_of_a_key(patient_redis: RedisServer, tmp_path: Path):
    """Requests and tokens are counted together, and nothing in Redis names a secret."""
    async with replicas(patient_redis, tmp_path) as (one, other):
        key = await one.key(limits={"requests_per_minute": 6})
        spender = await one.key(limits={"tokens_per_minute": 40})
        replies = await asyncio.gather(*(each.generate(key) for each in (one, other) for _ in range(5)))
        spent = [(await each.generate(spender, max_tokens=20)).status_code for each in (one, other) * 3]
        seen = await state(other)
        names = patient_redis.command("KEYS", "*")

    assert 6 == sum(reply.status_code == 200 for reply in replies)
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert "0" == refused.headers["x-ratelimit-remaining-requests"]
    assert {200, 429} == set(spent)
    assert ("ok", "shared", False) == seen
    assert b"llm-service:limits:" in names
    assert key.split("_")[1].encode() in names
    assert key.rpartition("_")[2].encode() not in names


async def test_replicas_share_the_attempts_with_wrong_keys(patient_redis: RedisServer, tmp_path: Path):
    security = {"api_key": "canary-key-1234", "failed_keys_per_minute": 4}
    async with replicas(patient_redis, tmp_path, security=security) as both:
        found = [(await each.generate("wrong-key-1234")).status_code for each in both * 4]

    assert [401] * 4 + [429] * 4 == found


async def test_each_replica_grants_its_share_while_redis_is_away_and_all_of_it_once_it_is_back(
    patient_redis: RedisServer, tmp_path: Path
):
    """Nothing fails meanwhile, /status and the metrics say so, and nobody restarts anything."""
    async with replicas(patient_redis, tmp_path) as (one, other):
        keys = [await one.key(limits={"requests_per_minute": 6}) for _ in range(2)]
        await asyncio.gather(*(each.generate(key) for each in (one, other) for key in keys))
        patient_redis.kill()
        try:
            away = [await statuses(replica, keys[0], 5) for replica in (one, other)]
            degraded = [await state(replica) for replica in (one, other)]
        finally:
            patient_redis.restart()
        await until(lambda: all(each.container.redis and not each.container.redis.fault for each in (one, other)))
        back = [await statuses(replica, keys[1], 4) for replica in (one, other)]
        healthy = await state(one)

    assert [[200, 200, 200, 429, 429]] * 2 == away
    assert [("does not answer", "share", True)] * 2 == degraded
    assert 6 == sum(each == 200 for found in back for each in found)
    assert ("ok", "shared", False) == healthy


async def test_a_service_can_refuse_while_redis_is_away(patient_redis: RedisServer, tmp_path: Path):
    limits = {"rate_limit": {"on_outage": "closed", "requests_per_minute": 100}}
    async with replicas(patient_redis, tmp_path, 1, **limits) as (one,):
        key = await one.key()
        patient_redis.kill()
        try:
            refused = await one.generate(key)
            async with one.client(key) as http:
                unlimited = await http.get("/v1/models")
            seen = await state(one)
        finally:
            patient_redis.restart()

    assert 503 == refused.status_code
    assert "2" == refused.headers["retry-after"]
    assert "Redis does not answer" in refused.json()["message"]
    assert 200 == unlimited.status_code
    assert ("does not answer", "closed", True) == seen


async def test_a_stalled_redis_stops_nobody_else(redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While a request waits for it the event loop goes on; one command is waited for, and none is sent after it."""
    wait_longer(monkeypatch, 1)
    settings = {"url": redis.url, "probe_seconds": HANG_SECONDS}
    async with replicas(redis, tmp_path, 1, redis=settings) as (one,):
        key = await one.key(limits={"requests_per_minute": 100, "tokens_per_minute": 1000, "parallel_requests": 5})
        await one.generate(key)
        assert one.container.redis is not None
        await one.container.redis.execute("PING")  # and what the request before left to be sent
        redis.command("CONFIG", "RESETSTAT")
        with redis.stalled():
            waiting, turns = asyncio.create_task(one.generate(key)), 0
            while not waiting.done():
                await asyncio.sleep(0.002)
                turns += 1
            later = await asyncio.gather(*(one.generate(key) for _ in range(3)))
        sent = redis.command("INFO", "commandstats")

    assert 200 == (await waiting).status_code
    assert [200] * 3 == [reply.status_code for reply in later]
    assert b"cmdstat_evalsha:calls=1," in sent
    assert turns > 10


async def test_the_place_of_a_dead_process_comes_back_and_that_of_a_living_one_does_not(redis: RedisServer):
    """A lease that nobody renews ends; Redis forgets everything meanwhile, and hears of the living one again."""

    async def refusal(store: RedisAdmissionStore, parallel: int) -> Refusal | None:
        """Ask for one of so many places, and give it back."""
        decision = await store.admit("k", Rates(parallel_requests=parallel))
        if decision.place:
            await store.leave(decision.place)
        return decision.refused

    async def until_refusal(wanted: Refusal | None, parallel: int) -> None:
        async with asyncio.timeout(HANG_SECONDS):
            while await refusal(other, parallel) is not wanted:  # noqa: ASYNC110  # Redis' clock has no event
                await asyncio.sleep(0.02)

    async with AsyncExitStack() as stack:
        living, dead, other = await stores(stack, *[redis.url] * 3, lease_seconds=3)
        renewing = asyncio.create_task(living.renew_leases())
        places = [(await store.admit("k", Rates(parallel_requests=2))).place for store in (living, dead)]
        full = await refusal(other, 2)
        await until_refusal(None, 2)
        living_has_its_place = await refusal(other, 1)
        redis.flush()
        await until_refusal(Refusal.PARALLEL, 1)
        assert None not in places
        await living.leave(str(places[0]))
        left = await refusal(living, 1)
        renewing.cancel()
        await asyncio.wait([renewing])

    assert [Refusal.PARALLEL, Refusal.PARALLEL, None] == [full, living_has_its_place, left]


async def test_places_are_left_and_tokens_put_back_where_they_were_taken(redis: RedisServer):
    """Whatever of Redis is there when they are."""
    rates = Rates(parallel_requests=2)
    async with AsyncExitStack() as stack:
        shared, other = await stores(stack, redis.url, redis.url)
        connection = RedisConnection(patient(redis.url).model_copy(update={"probe_seconds": 0.02}))
        stack.push_async_callback(connection.close)
        store = AdmissionStoreWithFallback(
            RedisAdmissionStore(connection, lease_seconds=20), MemoryAdmissionStore(), processes=2
        )
        watching = asyncio.create_task(connection.watch())
        in_redis = await store.admit("k", rates)
        shared_tokens = await store.take_tokens("k", TOKENS, 50)
        connection.breaker.trip()
        here = await store.admit("k", rates)
        none_left = await store.admit("k", rates)
        own_tokens = await store.take_tokens("k", TOKENS, 100)
        await until(lambda: connection.fault is None)
        assert here.place is not None
        assert in_redis.place is not None
        await store.leave(here.place)
        await store.return_tokens("k", TOKENS, 100, local=own_tokens.local)
        taken = await other.admit("k", rates)
        full = await shared.admit("k", rates)
        levels = await other.peek("k", Rates(tokens=TOKENS))
        await store.leave(in_redis.place)
        await store.return_tokens("k", TOKENS, 50, local=shared_tokens.local)
        await store.peek("k", rates)
        freed = await shared.admit("k", rates)
        restored = await other.peek("k", Rates(tokens=TOKENS))
        watching.cancel()
        await asyncio.wait([watching])

    assert [None, None, Refusal.PARALLEL] == [each.refused for each in (in_redis, here, none_left)]
    assert (False, True) == (shared_tokens.local, own_tokens.local)
    assert [None, Refusal.PARALLEL, None] == [each.refused for each in (taken, full, freed)]
    assert levels.tokens is not None
    assert restored.tokens is not None
    assert (250, 300) == (levels.tokens.remaining, restored.tokens.remaining)


async def test_a_request_that_is_cancelled_while_it_asks_keeps_no_place(redis: RedisServer):
    rates = Rates(parallel_requests=1)
    async with AsyncExitStack() as stack:
        (store,) = await stores(stack, redis.url)
        waiting = asyncio.create_task(store.admit("k", rates))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])

        assert (await store.admit("k", rates)).refused is None


async def test_limits_hold_over_a_slow_redis(redis: RedisServer):
    """Requests of one moment share a round trip, so its delay is paid once."""
    rates = Rates(requests=Bucket(10, 1e-6))
    async with slow_proxy(redis.port) as proxy, AsyncExitStack() as stack:
        (store,) = await stores(stack, f"redis://127.0.0.1:{proxy.port}")
        proxy.seconds = 0.1
        decisions = await asyncio.gather(*(store.admit("k", rates) for _ in range(100)))

    assert 10 == sum(decision.refused is None for decision in decisions)
