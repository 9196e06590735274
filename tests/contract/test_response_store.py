"""What every ResponseStore promises.  A store joins by adding a factory to `STORES`."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app.config import ChatHistoryConfig
from app.generation.responses import MemoryResponseStore, ResponseStore, StoredResponse
from app.generation.sessions import Turn
from app.stores.encryption import Encryption
from app.stores.redis_responses import RedisResponseStore
from app.types import Message, Role, Tenant
from tests.services.redis_connections import RedisConnections

TENANT_BYTES = 100
ANN, BOB = Tenant.owner("ann"), Tenant.owner("bob")
LIMITS = ChatHistoryConfig(ttl_seconds=100, max_turns=3, max_bytes=60, max_sessions=2)


class Clock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def date(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(
    params=["memory", *(pytest.param(name, marks=pytest.mark.services) for name in ("redis", "encrypted redis"))]
)
def store(request: pytest.FixtureRequest, clock: Clock) -> ResponseStore:
    if request.param == "memory":
        return MemoryResponseStore(LIMITS, clock=clock, tenant_bytes=TENANT_BYTES)
    connections: RedisConnections = request.getfixturevalue("redis_connections")
    encryption = Encryption([b"k" * 32] if request.param == "encrypted redis" else [])
    return RedisResponseStore(connections.new(), LIMITS, encryption, tenant_bytes=TENANT_BYTES, wall_clock=clock.date)


def turn(word: str) -> Turn:
    return Turn((Message(Role.USER, word), Message(Role.ASSISTANT, f"re {word}")))


def response(name: str, *words: str) -> StoredResponse:
    return StoredResponse(id=name, turns=tuple(map(turn, words)), document=b"{}", input_items=b"[]")


async def test_a_response_is_read_as_it_was_put(store: ResponseStore):
    """With its document, its input and the messages of all its turns."""
    await store.put(ANN, response("r", "one", "two"))
    found = await store.read(ANN, "r")

    assert response("r", "one", "two") == found
    assert found is not None
    assert ["one", "re one", "two", "re two"] == [message.content for message in found.messages]


async def test_a_response_belongs_to_its_tenant(store: ResponseStore):
    """Nobody else reads it or deletes it."""
    await store.put(ANN, response("r", "one"))

    assert await store.read(BOB, "r") is None
    assert not await store.delete(BOB, "r")
    assert await store.read(ANN, "r") is not None


async def test_a_deleted_response_is_gone_and_those_that_continue_it_stay(store: ResponseStore):
    """Each holds the conversation up to itself."""
    await store.put(ANN, response("first", "one"))
    await store.put(ANN, response("second", "one", "two"))

    assert await store.delete(ANN, "first")
    assert not await store.delete(ANN, "first")
    assert await store.read(ANN, "first") is None
    found = await store.read(ANN, "second")
    assert found is not None
    assert 4 == len(found.messages)


async def test_a_response_expires_after_its_time(store: ResponseStore, clock: Clock):
    """Reading it does not prolong that."""
    await store.put(ANN, response("r", "one"))
    clock.seconds += 99
    before = await store.read(ANN, "r")
    clock.seconds += 2

    assert before is not None
    assert await store.read(ANN, "r") is None


async def test_a_conversation_keeps_its_newest_turns(store: ResponseStore):
    """As many as the limits of sessions allow in number and in bytes, and at least one."""
    await store.put(ANN, response("many", "a", "b", "c", "d"))
    await store.put(ANN, response("long", "x" * 20, "y" * 10))
    many, long = await store.read(ANN, "many"), await store.read(ANN, "long")

    assert many is not None
    assert long is not None
    assert (turn("b"), turn("c"), turn("d")) == many.turns
    assert (turn("y" * 10),) == long.turns


async def test_a_tenants_least_recently_used_response_goes_first(store: ResponseStore):
    """And never that of another tenant."""
    await store.put(BOB, response("r", "one"))
    for name in ("first", "second"):
        await store.put(ANN, response(name, "one"))
    await store.read(ANN, "first")
    await store.put(ANN, response("third", "one"))

    assert await store.read(ANN, "second") is None
    assert await store.read(ANN, "first") is not None
    assert await store.read(BOB, "r") is not None


async def test_what_is_shown_of_a_tenants_responses_is_bounded_in_bytes(store: ResponseStore):
    """Documents and inputs together; one alone always fits, and nobody else loses any."""
    large = replace(response("large", "one"), document=b"x" * 30, input_items=b"y" * 30)
    await store.put(BOB, response("r", "one"))
    await store.put(ANN, large)
    await store.put(ANN, replace(large, id="next"))
    after = [await store.read(ANN, name) is not None for name in ("large", "next")]
    await store.put(ANN, replace(large, id="huge", document=b"x" * 1000))

    assert [False, True] == after
    assert await store.read(ANN, "next") is None
    assert await store.read(ANN, "huge") is not None
    assert await store.read(BOB, "r") is not None
