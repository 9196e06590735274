"""What every AdmissionStore promises, over a real Redis too.  A store joins by its name in `STORES`."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

import pytest

from app.access.admission_store import AdmissionStore, Rates, Refusal
from app.access.token_bucket import Bucket
from app.stores.memory_admission import MemoryAdmissionStore
from app.stores.redis_admission import AdmissionStoreWithFallback, RedisAdmissionStore
from app.stores.redis_connection import RedisConnection
from tests.ports import free_port
from tests.services.redis_race import patient
from tests.services.redis_server import RedisServer
from tests.waiting import HANG_SECONDS

STORES = [
    "memory",
    "without redis",
    pytest.param("redis", marks=pytest.mark.services),
    pytest.param("redis, with fallback", marks=pytest.mark.services),
]
REQUESTS, TOKENS = Bucket(capacity=3, per_second=0.1), Bucket(capacity=100, per_second=1)
RATES = Rates(requests=REQUESTS, tokens=TOKENS, parallel_requests=2)


class Clock(Protocol):
    """The time by which a store goes."""

    def advance(self, seconds: float) -> None: ...


class SettableClock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class RedisClock:
    """Redis' own time, which cannot be set: what is in its buckets becomes so much older instead."""

    AGE = """
        for _, key in ipairs(redis.call('KEYS', '*:limits:*')) do
          for _, field in ipairs({'requests:at', 'tokens:at'}) do
            if redis.call('HEXISTS', key, field) == 1 then redis.call('HINCRBYFLOAT', key, field, -ARGV[1]) end
          end
        end
    """

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def advance(self, seconds: float) -> None:
        self._server.command("EVAL", self.AGE, "0", str(seconds))


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(request: pytest.FixtureRequest, kind: str) -> RedisServer | None:
    """An empty Redis for the stores that need one."""
    return request.getfixturevalue("redis") if kind.startswith("redis") else None


@pytest.fixture
def clock(server: RedisServer | None) -> Clock:
    return RedisClock(server) if server else SettableClock()


@pytest.fixture
async def store(kind: str, server: RedisServer | None, clock: Clock) -> AsyncIterator[AdmissionStore]:
    memory = MemoryAdmissionStore(clock=clock) if isinstance(clock, SettableClock) else MemoryAdmissionStore()
    if kind == "memory":
        yield memory
        return
    url = server.url if server else f"redis://127.0.0.1:{free_port()}"
    connection = RedisConnection(patient(url))
    shared = RedisAdmissionStore(connection, lease_seconds=20)
    yield shared if kind == "redis" else AdmissionStoreWithFallback(shared, memory, processes=1)
    await connection.close()


async def left(store: AdmissionStore, key_id: str = "k") -> tuple[int, int]:
    levels = await store.peek(key_id, RATES)
    assert levels.requests is not None
    assert levels.tokens is not None
    return levels.requests.remaining, levels.tokens.remaining


async def test_a_burst_is_admitted_and_then_the_rate(store: AdmissionStore, clock: Clock):
    """A refusal says when to come back and changes nothing."""
    rates = Rates(requests=REQUESTS)
    decisions = [await store.admit("k", rates) for _ in range(5)]

    assert [None, None, None, Refusal.REQUESTS, Refusal.REQUESTS] == [each.refused for each in decisions]
    states = [each.levels.requests for each in decisions]
    assert [2, 1, 0, 0, 0] == [state.remaining for state in states if state]
    assert 10.0 == pytest.approx(max(state.retry_in for state in states if state), abs=1)
    clock.advance(10.001)
    assert (await store.admit("k", rates)).refused is None
    assert (await store.admit("k", rates)).refused is Refusal.REQUESTS


async def test_parallel_places_are_counted_and_freed(store: AdmissionStore):
    """Whoever finds none has spent a request all the same."""
    rates = Rates(requests=Bucket(capacity=4, per_second=0.1), tokens=TOKENS, parallel_requests=2)
    first, second, third = [await store.admit("k", rates) for _ in range(3)]

    assert (None, None, Refusal.PARALLEL) == (first.refused, second.refused, third.refused)
    assert third.place is None
    assert third.levels.requests is not None
    assert 1 == third.levels.requests.remaining
    assert first.place is not None
    await store.leave(first.place)
    assert (await store.admit("k", rates)).refused is None
    assert second.place is not None
    await store.leave(second.place)
    assert (await store.admit("k", rates)).refused is Refusal.REQUESTS


async def test_without_a_single_token_nobody_is_admitted(store: AdmissionStore, clock: Clock):
    """The attempt costs a request."""
    await store.take_tokens("k", TOKENS, 100)

    assert (await store.admit("k", RATES)).refused is Refusal.TOKENS
    assert (2, 0) == await left(store)
    clock.advance(1)
    assert (await store.admit("k", RATES)).refused is None


async def test_the_rate_of_requests_refuses_first_and_costs_nothing(store: AdmissionStore, clock: Clock):
    """The order in which a client is told of its limits: requests, places, tokens.

    So whoever keeps sending while it is refused runs out of requests, and who then waits as it is told gets through.
    """
    rates = Rates(requests=Bucket(capacity=3, per_second=0.1), tokens=TOKENS, parallel_requests=1)
    admitted = await store.admit("k", rates)
    taken = await store.take_tokens("k", TOKENS, 100)

    assert (await store.admit("k", rates)).refused is Refusal.PARALLEL
    assert admitted.place is not None
    await store.leave(admitted.place)
    assert (await store.admit("k", rates)).refused is Refusal.TOKENS
    await store.return_tokens("k", TOKENS, 100, local=taken.local)
    refused = [await store.admit("k", rates) for _ in range(20)]
    assert {Refusal.REQUESTS} == {each.refused for each in refused}
    assert refused[-1].levels.requests is not None
    clock.advance(refused[-1].levels.requests.retry_in)
    assert (await store.admit("k", rates)).refused is None


async def test_tokens_are_taken_whole_or_not_at_all(store: AdmissionStore):
    taken = await store.take_tokens("k", TOKENS, 70)
    refused = await store.take_tokens("k", TOKENS, 50)

    assert (True, 30) == (taken.granted, taken.remaining)
    assert (False, 30) == (refused.granted, refused.remaining)
    assert pytest.approx(20.0, abs=1) == refused.retry_in
    await store.return_tokens("k", TOKENS, 20, local=taken.local)
    assert (3, 50) == await left(store)
    await store.return_tokens("k", TOKENS, 500, local=taken.local)
    assert (3, 100) == await left(store)


async def test_keys_do_not_share(store: AdmissionStore):
    for _ in range(2):
        await store.admit("one", RATES)
    await store.take_tokens("one", TOKENS, 100)

    assert (3, 100) == await left(store, "other")
    assert (await store.admit("other", RATES)).refused is None


async def test_without_limits_everyone_is_admitted(store: AdmissionStore):
    decisions = [await store.admit("k", Rates()) for _ in range(100)]

    assert {None} == {each.refused for each in decisions}
    assert {(None, None)} == {(each.levels.requests, each.levels.tokens) for each in decisions}


async def test_many_at_once_get_exactly_what_there_is(store: AdmissionStore):
    rates = Rates(requests=Bucket(capacity=20, per_second=0.001), parallel_requests=50)
    decisions = await asyncio.gather(*(store.admit("k", rates) for _ in range(60)))
    taken = await asyncio.gather(*(store.take_tokens("k", TOKENS, 7) for _ in range(60)))

    assert 20 == sum(each.refused is None for each in decisions)
    assert 14 == sum(each.granted for each in taken)


@pytest.mark.parametrize("what", ["leave", "return_tokens"])
async def test_giving_back_survives_a_cancellation(store: AdmissionStore, what: str):
    """A client that hangs up in that moment costs its key nothing."""
    place = (await store.admit("k", RATES)).place
    await store.admit("k", RATES)
    taken = await store.take_tokens("k", TOKENS, 40)
    assert place is not None
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "leave": lambda: store.leave(place),
        "return_tokens": lambda: store.return_tokens("k", TOKENS, 40, local=taken.local),
    }

    async def finish() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await calls[what]()

    finishing = asyncio.create_task(finish())
    await asyncio.sleep(0)
    for _ in range(2):
        finishing.cancel()
    with suppress(asyncio.CancelledError):
        await finishing
    async with asyncio.timeout(HANG_SECONDS):
        while not await _came_back(store, what):  # noqa: ASYNC110  # a store's own task has no event
            await asyncio.sleep(0.01)


async def _came_back(store: AdmissionStore, what: str) -> bool:
    if what == "leave":
        return (await store.admit("k", Rates(parallel_requests=2))).refused is None
    return await left(store) == (1, 100)
