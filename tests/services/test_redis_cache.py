"""The response cache of several replicas over one Redis: one generates what many ask for."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from pydantic import SecretStr
from redis import Redis

from app.config import CacheConfig, RedisConfig
from app.engine.cache import CachedEngine, cache_key
from app.engine.echo import EchoEngine
from app.engine.persistent_cache import Claim, PersistentCacheEngine
from app.events import Delta, Event, Started, finish
from app.requests import GenerationRequest, Progress
from app.stores.encryption import Encryption
from app.stores.redis_connection import RedisConnection
from app.stores.redis_response_cache import MAX_STORED_BYTES, RedisResponseCache
from app.types import FinishReason, SamplingParams, Tenant, Usage
from tests.services.redis_connections import PATIENCE_SECONDS, RedisConnections
from tests.services.redis_server import RedisServer
from tests.unit.event_streams import finished_of, read, text_of
from tests.waiting import HANG_SECONDS, until
from tests.web.access import ADMIN_KEY, running

pytestmark = pytest.mark.services

LEASE_SECONDS = 0.5
PREFIX = "replicas"
REQUEST = GenerationRequest(
    id="one",
    tenant=Tenant.owner("tenant"),
    prompt_ids=tuple(map(ord, "hello there")),
    sampling=SamplingParams(max_tokens=20),
)


class CountingEngine(EchoEngine):
    """Counts the requests that reach it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.calls += 1
        async with aclosing(super().stream(request)) as events:
            async for event in events:
                yield event


class Replica:
    """The caches of one replica over its engine."""

    def __init__(
        self,
        connections: RedisConnections,
        *,
        delay: float = 0.01,
        timeout_seconds: float = PATIENCE_SECONDS,
        **options: Any,
    ) -> None:
        self.engine = CountingEngine(token_delay_seconds=delay)
        self.store = RedisResponseCache(
            connections.new(PREFIX, timeout_seconds=timeout_seconds),
            60,
            Encryption([b"k" * 32]),
            lease_seconds=LEASE_SECONDS,
        )
        self.unreadable = 0
        self.below = PersistentCacheEngine(
            self.engine, self.store, scope="", claims=self.store, on_unreadable=self._count, **options
        )
        self.cached = CachedEngine(self.below, CacheConfig())

    def _count(self) -> None:
        self.unreadable += 1

    async def send(self, number: int = 0, **changes: Any) -> list[Event]:
        request = structs.replace(REQUEST, id=f"r{number}", progress=Progress(), **changes)
        return await read(self.cached.stream(request))


@asynccontextmanager
async def replicas(connections: RedisConnections, count: int = 3, **options: Any) -> AsyncIterator[list[Replica]]:
    group = [Replica(connections, **options) for _ in range(count)]
    for each in group:
        await each.engine.start()
    yield group
    for each in group:
        await each.store.close()


async def test_fifty_equal_requests_over_three_replicas_are_one_generation(redis_connections: RedisConnections):
    """All get the whole answer; another tenant's is another."""
    async with replicas(redis_connections) as group:
        answers = await asyncio.gather(*(group[number % 3].send(number) for number in range(50)))
        calls = sum(each.engine.calls for each in group)
        await group[0].send(tenant=Tenant.owner("other"))

    assert {"hello there"} == {text_of(answer) for answer in answers}
    assert 1 == calls
    assert 2 == sum(each.engine.calls for each in group)


async def test_real_services_generate_once_for_all(patient_redis: RedisServer, tmp_path: Path):
    """As requests, whole and streamed."""
    engines = [CountingEngine(token_delay_seconds=0.01) for _ in range(2)]
    given: dict[str, Any] = {"redis": {"url": patient_redis.url}}
    body: dict[str, Any] = {"prompt": "hello there", "temperature": 0, "max_tokens": 20, "cache": True}
    async with (
        running(tmp_path / "a", engine=engines[0], **given) as one,
        running(tmp_path / "b", engine=engines[1], **given) as other,
    ):
        replies = await asyncio.gather(
            *((one, other)[number % 2].generate(ADMIN_KEY, **body, stream=number % 4 > 1) for number in range(12))
        )

    assert {200} == {reply.status_code for reply in replies}
    assert 1 == sum(engine.calls for engine in engines)


async def test_whoever_stops_waiting_stops_nobody_else(redis_connections: RedisConnections):
    """Neither the generation nor the others that wait for it."""
    async with replicas(redis_connections, delay=0.03) as (leader, one, other):
        leading = asyncio.create_task(leader.send())
        await until(lambda: leader.engine.calls == 1)
        waiting = [asyncio.create_task(each.send()) for each in (one, other)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()
        answers = await asyncio.gather(leading, waiting[1])

    assert [False, True] == [finished_of(answer).cached for answer in answers]
    assert [1, 0, 0] == [each.engine.calls for each in (leader, one, other)]


async def test_another_generates_when_the_first_is_left_by_its_clients(redis_connections: RedisConnections):
    """One of those that wait, and the rest go on waiting for that."""
    async with replicas(redis_connections, delay=0.03) as (leader, one, other):
        leading = asyncio.create_task(leader.send())
        await until(lambda: leader.engine.calls == 1)
        waiting = [asyncio.create_task(each.send()) for each in (one, other)]
        await asyncio.sleep(0.1)
        leading.cancel()
        answers = await asyncio.gather(*waiting)

    assert 1 == one.engine.calls + other.engine.calls
    assert [False, True] == sorted(finished_of(answer).cached for answer in answers)


def name_of(redis: RedisServer) -> str:
    """Return the key of the one response that these tests ask for."""
    key = cache_key(REQUEST, EchoEngine().info, "")
    return RedisConnection(RedisConfig(url=SecretStr(redis.url), key_prefix=PREFIX)).key("cache", key.hex())


async def test_another_generates_soon_after_a_replica_died(redis: RedisServer, redis_connections: RedisConnections):
    """Its claim is not renewed any more, and ends."""
    with Redis(port=redis.port) as client:
        client.set(f"{name_of(redis)}:claim", "token of the dead", px=int(LEASE_SECONDS * 1000))
    async with replicas(redis_connections, 1) as (alive,):
        async with asyncio.timeout(HANG_SECONDS):
            answer = await alive.send()
        again = await alive.send()

    assert [False, True] == [finished_of(each).cached for each in (answer, again)]
    assert 1 == alive.engine.calls


async def test_a_wait_for_another_replica_is_bounded(redis_connections: RedisConnections):
    """Then it is generated here, too."""
    async with replicas(redis_connections, 2, delay=0.1, wait_seconds=0.2) as (slow, other):
        leading = asyncio.create_task(slow.send())
        await until(lambda: slow.engine.calls == 1)
        following = asyncio.create_task(other.send())
        await until(lambda: other.engine.calls == 1)
        answers = await asyncio.gather(leading, following)

    assert [False, False] == [finished_of(answer).cached for answer in answers]


async def test_nobody_waits_for_an_answer_that_cannot_be_stored(redis_connections: RedisConnections):
    """It is generated for each of those that wait, at the same time and not one after the other."""

    async def mask(tenant: Tenant, text: str, *, cut: bool = False) -> str:
        return "masked"

    async with replicas(redis_connections, 3, mask=mask) as group:
        first = asyncio.create_task(group[0].send())
        await until(lambda: group[0].engine.calls == 1)
        others = [asyncio.create_task(each.send()) for each in group[1:]]
        await first
        await until(lambda: [1, 1, 1] == [each.engine.calls for each in group])
        await asyncio.gather(*others)


async def test_redis_away_is_a_miss_also_for_those_that_wait(redis: RedisServer, redis_connections: RedisConnections):
    """Everyone generates for itself, and waits no longer than for any reply of Redis."""
    async with replicas(redis_connections, 2, delay=0.1, timeout_seconds=0.2) as (leader, other):
        leading = asyncio.create_task(leader.send())
        await until(lambda: leader.engine.calls == 1)
        following = asyncio.create_task(other.send())
        await asyncio.sleep(0.05)
        with redis.stalled():
            await until(lambda: other.engine.calls == 1)
            answers = await asyncio.gather(leading, following)

    assert [False, False] == [finished_of(answer).cached for answer in answers]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\x80\x04\x95garbage.", b"{}", b"x" * (MAX_STORED_BYTES + 1)],
    ids=["empty", "pickle", "json", "huge"],
)
async def test_what_cannot_be_read_is_a_miss_and_counted_and_replaced(
    garbage: bytes, redis: RedisServer, redis_connections: RedisConnections
):
    """Nothing is unpickled, nothing larger than an answer is fetched."""
    with Redis(port=redis.port) as client:
        client.set(name_of(redis), garbage)
    async with replicas(redis_connections, 2) as (one, other):
        answers = [await one.send()]
        await one.store.close()
        answers.append(await other.send())

    assert [False, True] == [finished_of(answer).cached for answer in answers]
    assert 1 == one.unreadable


@pytest.mark.parametrize(
    "events",
    [[], [Started()], [Started(), Delta(text="x")], [Delta(text="x"), finish(FinishReason.STOP, Usage(1, 1))]],
    ids=["none", "no end", "no end after a text", "no beginning"],
)
async def test_events_that_are_no_whole_answer_are_a_miss(events: list[Event], redis_connections: RedisConnections):
    """Whoever stored them: a stream begins, and it ends."""
    async with replicas(redis_connections, 1) as (replica,):
        replica.store.put(cache_key(REQUEST, replica.engine.info, ""), msgspec.msgpack.encode(events))
        await replica.store.close()
        answer = await replica.send()

    assert not finished_of(answer).cached
    assert 1 == replica.unreadable


async def test_a_request_that_waits_can_be_aborted(redis: RedisServer, redis_connections: RedisConnections):
    """It ends at once, and nothing is generated."""
    with Redis(port=redis.port) as client:
        client.set(f"{name_of(redis)}:claim", "token of another", px=300_000)
    async with replicas(redis_connections, 1) as (replica,):
        waiting = asyncio.create_task(read(replica.below.stream(REQUEST)))
        await asyncio.sleep(0.05)
        await replica.below.abort(REQUEST.id)
        async with asyncio.timeout(HANG_SECONDS):
            (last,) = await waiting

    assert FinishReason.ABORT is finished_of([last]).finish_reason
    assert 0 == replica.engine.calls


async def test_a_request_aborted_as_it_claims_keeps_nobody_waiting(
    redis_connections: RedisConnections, monkeypatch: pytest.MonkeyPatch
):
    """Its claim ends with it."""
    async with replicas(redis_connections, 2) as (one, other):
        claim = one.store.claim

        async def claim_and_abort(key: bytes, *, replacing: bool = False) -> Claim:
            claimed = await claim(key, replacing=replacing)
            await one.below.abort(REQUEST.id)
            return claimed

        monkeypatch.setattr(one.store, "claim", claim_and_abort)
        (last,) = await read(one.below.stream(REQUEST))
        async with asyncio.timeout(HANG_SECONDS / 2):  # it would wait for as long as HANG_SECONDS
            answer = await other.send()

    assert FinishReason.ABORT is finished_of([last]).finish_reason
    assert 0 == one.engine.calls
    assert not finished_of(answer).cached


async def test_a_claim_that_redis_has_lost_leaves_nothing_behind(
    redis: RedisServer, redis_connections: RedisConnections
):
    """The same process claims the response again: one task renews that claim, and none the earlier one."""
    before = asyncio.all_tasks()
    async with replicas(redis_connections, 1) as (replica,):
        assert Claim.GRANTED is await replica.store.claim(b"key")
        redis.flush()
        assert Claim.GRANTED is await replica.store.claim(b"key")
    # What a close has cancelled ends in the loop's next turn.
    await until(lambda: not any("_renew" in repr(task) for task in asyncio.all_tasks() - before))
