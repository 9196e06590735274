"""What every SessionStore promises.  A store joins by adding a factory to `STORES`."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from app.config import ChatHistoryConfig
from app.generation.sessions import MemorySessionStore, SessionStore, Turn
from app.stores.encryption import Encryption
from app.stores.redis_sessions import RedisSessionStore
from app.types import Message, Role, Tenant, ToolCall
from tests.examples import examples
from tests.services.redis_connections import RedisConnections
from tests.waiting import HANG_SECONDS

Factory = Callable[[ChatHistoryConfig, "Clock"], SessionStore]
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


def memory(config: ChatHistoryConfig, clock: Clock) -> SessionStore:
    return MemorySessionStore(config, clock=clock, wall_clock=clock.date)


@pytest.fixture(
    params=["memory", *(pytest.param(name, marks=pytest.mark.services) for name in ("redis", "encrypted redis"))]
)
def factory(request: pytest.FixtureRequest) -> Factory:
    """Makes stores; those in Redis are empty, and stand on connections that end with the test."""
    if request.param == "memory":
        return memory
    connections: RedisConnections = request.getfixturevalue("redis_connections")
    encryption = Encryption([b"k" * 32] if request.param == "encrypted redis" else [])

    def make(config: ChatHistoryConfig, clock: Clock) -> SessionStore:
        return RedisSessionStore(connections.new(), config, encryption, wall_clock=clock.date)

    return make


async def count(store: SessionStore) -> int:
    if isinstance(store, RedisSessionStore):
        await store.refresh_count()
    return store.count()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def turn(word: str) -> Turn:
    return Turn((Message(Role.USER, word), Message(Role.ASSISTANT, f"re {word}")))


async def test_a_session_gives_back_its_turns_in_order(factory: Factory, clock: Clock):
    """What was appended is read back whole, with the times of the first and the last turn."""
    store = factory(LIMITS, clock)

    await store.append(ANN, "s", turn("one"))
    clock.seconds += 5
    await store.append(ANN, "s", turn("two"))
    clock.seconds += 10
    session = await store.read(ANN, "s")

    assert session is not None
    assert "s" == session.session_id
    assert (turn("one"), turn("two")) == session.turns
    assert timedelta(seconds=5) == session.updated - session.created
    assert UTC == session.created.tzinfo
    assert 90 == pytest.approx(session.expires_in_seconds, abs=1)


async def test_another_tenant_neither_reads_nor_deletes_a_session(factory: Factory, clock: Clock):
    """The same id of another tenant is another session."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "s", turn("hers"))

    assert await store.read(BOB, "s") is None
    assert not await store.delete(BOB, "s")
    assert [] == list(await store.list(BOB))
    assert await store.read(ANN, "s") is not None


async def test_names_do_not_run_together(factory: Factory, clock: Clock):
    """Tenant and id are two fields, not one joined text."""
    store = factory(LIMITS, clock)

    await store.append(Tenant.owner("a:b"), "c", turn("one"))

    assert await store.read(Tenant.owner("a"), "b:c") is None


async def test_the_oldest_whole_turn_goes_first(factory: Factory, clock: Clock):
    """More turns than allowed: the last ones stay, each whole."""
    store = factory(LIMITS, clock)

    for word in "abcde":
        await store.append(ANN, "s", turn(word))
    session = await store.read(ANN, "s")

    assert session is not None
    assert (turn("c"), turn("d"), turn("e")) == session.turns


async def test_too_much_text_drops_the_oldest_turns(factory: Factory, clock: Clock):
    """Bytes are counted, not characters: 'ä' is two."""
    store = factory(LIMITS, clock)
    wide = turn("ä" * 13)  # 55 bytes, 29 characters

    await store.append(ANN, "s", turn("one"))
    await store.append(ANN, "s", wide)
    session = await store.read(ANN, "s")

    assert session is not None
    assert (wide,) == session.turns


async def test_what_tools_say_continues_the_turn_that_called(factory: Factory, clock: Clock):
    """However long an agent goes on, its question stays, and so do the turns before it that have room."""
    store = factory(ChatHistoryConfig(max_turns=2), clock)
    call = ToolCall("call_1", "look_up", "{}")
    question, calls = Message(Role.USER, "?"), Message(Role.ASSISTANT, "", tool_calls=(call,))
    step = (Message(Role.TOOL, "!", tool_call_id="call_1"), calls)

    await store.append(ANN, "s", turn("gone"))
    await store.append(ANN, "s", turn("before"))
    await store.append(ANN, "s", Turn((question, calls)))
    for _ in range(5):
        await store.append(ANN, "s", Turn(step))
    session = await store.read(ANN, "s")

    assert session is not None
    assert (turn("before"), Turn((question, calls, *step * 5))) == session.turns


async def test_a_long_loop_keeps_its_question_over_the_limit_of_bytes(factory: Factory, clock: Clock):
    """The turn is the newest, and never goes."""
    store = factory(LIMITS, clock)
    answer = Turn((Message(Role.TOOL, "x" * 50, tool_call_id="call_1"), Message(Role.ASSISTANT, "well")))

    await store.append(ANN, "s", turn("one"))
    for _ in range(3):
        await store.append(ANN, "s", answer)
    session = await store.read(ANN, "s")

    assert session is not None
    assert (Turn((*turn("one").messages, *answer.messages * 3)),) == session.turns


async def test_what_a_tool_says_in_an_empty_session_is_stored_until_a_turn_follows(factory: Factory, clock: Clock):
    """No session is without turns; what answers nothing goes as soon as there is another."""
    store = factory(LIMITS, clock)
    lone = Turn((Message(Role.TOOL, "!"), Message(Role.ASSISTANT, "well")))

    await store.append(ANN, "s", lone)
    only = await store.read(ANN, "s")
    await store.append(ANN, "s", turn("one"))
    after = await store.read(ANN, "s")

    assert only is not None
    assert after is not None
    assert ((lone,), (turn("one"),)) == (only.turns, after.turns)


async def test_the_newest_turn_is_kept_whatever_its_size(factory: Factory, clock: Clock):
    """A turn over the limit is not lost; it is the only one until the next."""
    store = factory(LIMITS, clock)
    huge = turn("x" * 500)

    await store.append(ANN, "s", turn("one"))
    await store.append(ANN, "s", huge)
    only = await store.read(ANN, "s")
    await store.append(ANN, "s", turn("two"))
    after = await store.read(ANN, "s")

    assert only is not None
    assert after is not None
    assert (huge,) == only.turns
    assert (turn("two"),) == after.turns


async def test_several_turns_are_appended_at_once(factory: Factory, clock: Clock):
    """With the same result as one after the other."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "s", turn("one"))
    await store.append(ANN, "s", *map(turn, "abc"))
    session = await store.read(ANN, "s")

    assert session is not None
    assert tuple(map(turn, "abc")) == session.turns


async def test_a_session_is_forgotten_some_time_after_its_last_turn(factory: Factory, clock: Clock):
    """Each turn begins the time anew; reading does not."""
    store = factory(LIMITS, clock)

    await store.append(ANN, "s", turn("one"))
    clock.seconds += 99
    await store.append(ANN, "s", turn("two"))
    clock.seconds += 99
    alive = await store.read(ANN, "s")
    clock.seconds += 2

    assert alive is not None
    assert await store.read(ANN, "s") is None
    assert [] == list(await store.list(ANN))
    assert not await store.delete(ANN, "s")
    assert 0 == await count(store)


async def test_a_session_begun_anew_has_no_past(factory: Factory, clock: Clock):
    """After expiry the same id starts empty, with a new date."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "s", turn("old"))
    clock.seconds += 101

    await store.append(ANN, "s", turn("new"))
    session = await store.read(ANN, "s")

    assert session is not None
    assert (turn("new"),) == session.turns
    assert session.created == session.updated


async def test_the_least_recently_used_session_goes_first(factory: Factory, clock: Clock):
    """One session too many pushes out the one neither written nor read for longest; listing is no use."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "a", turn("one"))
    await store.append(ANN, "b", turn("one"))
    await store.append(BOB, "a", turn("one"))
    await store.read(ANN, "a")
    await store.list(ANN)

    await store.append(ANN, "c", turn("one"))

    assert ["c", "a"] == [summary.session_id for summary in await store.list(ANN)]
    assert await store.read(BOB, "a") is not None


async def test_sessions_are_listed_newest_first(factory: Factory, clock: Clock):
    """A summary has the number of turns, the bytes of text and the time of the last turn."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "a", turn("one"))
    clock.seconds += 1
    await store.append(ANN, "b", turn("one"))
    clock.seconds += 1
    await store.append(ANN, "a", turn("two"))

    first, second = await store.list(ANN)

    assert ("a", 2, 18, clock.date()) == (first.session_id, first.turns, first.text_bytes, first.updated)
    assert ("b", 1, 9) == (second.session_id, second.turns, second.text_bytes)


async def test_a_deleted_session_is_gone(factory: Factory, clock: Clock):
    """Deleting reports whether there was something to delete."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "s", turn("one"))

    assert await store.delete(ANN, "s")
    assert not await store.delete(ANN, "s")
    assert await store.read(ANN, "s") is None
    assert 0 == await count(store)


async def test_a_title_stays_with_its_session_and_prolongs_nothing(factory: Factory, clock: Clock):
    """It is read and listed, survives the next turn, belongs to one tenant, and ends with the session."""
    store = factory(LIMITS, clock)
    await store.append(ANN, "s", turn("one"))
    clock.seconds += 60

    renamed = [await store.rename(tenant, "s", "Kürzer 🦦") for tenant in (ANN, BOB)]
    await store.append(ANN, "other", turn("one"))
    listed = {summary.session_id: summary.title for summary in await store.list(ANN)}
    session = await store.read(ANN, "s")
    clock.seconds += 41
    gone = await store.read(ANN, "s")
    await store.append(ANN, "s", turn("two"))
    anew = await store.read(ANN, "s")

    assert [True, False] == renamed
    assert {"s": "Kürzer 🦦", "other": None} == listed
    assert session is not None
    assert ("Kürzer 🦦", 40) == (session.title, round(session.expires_in_seconds))
    assert gone is None
    assert anew is not None
    assert anew.title is None
    assert await store.rename(ANN, "s", "Again")
    await store.append(ANN, "s", turn("three"))
    assert ["Again"] == [each.title for each in await store.list(ANN) if each.session_id == "s"]


async def test_ten_thousand_sessions_stay_bounded(factory: Factory, clock: Clock):
    """One tenant cannot fill the memory, and its newest sessions are the ones that stay."""
    store = factory(ChatHistoryConfig(max_sessions=100), clock)
    many = 10_000 if isinstance(store, MemorySessionStore) else 400  # elsewhere each is a round trip

    for number in range(many):
        await store.append(ANN, f"s{number}", turn("one"))

    assert 100 == await count(store)
    assert await store.read(ANN, f"s{many - 101}") is None
    assert await store.read(ANN, f"s{many - 100}") is not None


async def test_twenty_parallel_turns_are_twenty_whole_pairs(factory: Factory, clock: Clock):
    """Under the lock each request sees the turns before its own and adds exactly one."""
    store = factory(ChatHistoryConfig(), clock)

    async def one_request(number: int) -> None:
        async with store.turn(ANN, "s"):
            before = await store.read(ANN, "s")
            await asyncio.sleep(0.001)
            seen = len(before.turns) if before else 0
            await store.append(ANN, "s", turn(f"{number} after {seen}"))

    await asyncio.gather(*(one_request(number) for number in range(20)))
    session = await store.read(ANN, "s")

    assert session is not None
    assert tuple(turn(f"{number} after {number}") for number in range(20)) == session.turns


async def test_sessions_do_not_wait_for_one_another(factory: Factory, clock: Clock):
    """Neither another session of the tenant nor the same id of another tenant has to wait."""
    store = factory(LIMITS, clock)

    async with (
        asyncio.timeout(HANG_SECONDS),
        store.turn(ANN, "s"),
        store.turn(ANN, "t"),
        store.turn(BOB, "s"),
    ):
        await store.append(BOB, "s", turn("one"))

    assert await store.read(BOB, "s") is not None


async def test_a_cancelled_waiter_does_not_break_the_lock(factory: Factory, clock: Clock):
    """Who stops waiting leaves the line; who waits behind gets the session when it is free, not before."""
    store = factory(LIMITS, clock)
    entered: list[str] = []

    async def wait_for_turn(name: str) -> None:
        async with store.turn(ANN, "s"):
            entered.append(name)

    async with store.turn(ANN, "s"):
        first = asyncio.create_task(wait_for_turn("first"))
        second = asyncio.create_task(wait_for_turn("second"))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        inside = list(entered)
    await asyncio.wait_for(second, HANG_SECONDS)

    assert first.cancelled()
    assert [] == inside
    assert ["second"] == entered


async def test_a_failed_turn_frees_the_session(factory: Factory, clock: Clock):
    """An error inside the turn is the caller's, and the lock is free after it."""
    store = factory(LIMITS, clock)

    with pytest.raises(ValueError, match="mine"):
        async with store.turn(ANN, "s"):
            raise ValueError("mine")

    async with asyncio.timeout(HANG_SECONDS), store.turn(ANN, "s"):
        await store.append(ANN, "s", turn("one"))
    assert 1 == await count(store)


OWNERS = (ANN, BOB, Tenant.owner("a/b"), Tenant.key("ann"))
TENANTS = st.sampled_from(OWNERS)
IDS = st.sampled_from(["1", "2", "b/1"])


@pytest.mark.hypothesis
def test_a_tenant_only_ever_reads_what_it_wrote(factory: Factory, request: pytest.FixtureRequest):
    """Whatever is written, read, deleted and waited for: a tenant sees its own whole turns, within the limits."""

    async def close() -> None:
        if factory is not memory:
            await request.getfixturevalue("redis_connections").close()

    class Model(RuleBasedStateMachine):
        """Runs the store beside a plain list of what each tenant wrote since its session last ended."""

        def __init__(self) -> None:
            super().__init__()
            self.clock = Clock()
            self.store = factory(LIMITS, self.clock)
            self.runner = asyncio.Runner()
            self.written: dict[tuple[Tenant, str], list[Turn]] = {}
            self.last: dict[tuple[Tenant, str], float] = {}

        def teardown(self) -> None:
            self.runner.run(close())
            self.runner.close()

        @rule(tenant=TENANTS, session_id=IDS, word=st.text(max_size=30))
        def append(self, tenant: Tenant, session_id: str, word: str) -> None:
            new = turn(f"{tenant} {session_id} {word}")
            self.runner.run(self.store.append(tenant, session_id, new))
            self.written.setdefault((tenant, session_id), []).append(new)
            self.last[tenant, session_id] = self.clock.seconds

        @rule(tenant=TENANTS, session_id=IDS)
        def delete(self, tenant: Tenant, session_id: str) -> None:
            self.runner.run(self.store.delete(tenant, session_id))
            self.written.pop((tenant, session_id), None)

        @rule(seconds=st.floats(0, 150))
        def wait(self, seconds: float) -> None:
            self.clock.seconds += seconds

        @rule(tenant=TENANTS, session_id=IDS)
        def read(self, tenant: Tenant, session_id: str) -> None:
            session = self.runner.run(self.store.read(tenant, session_id))
            if session is None:
                return
            turns = list(session.turns)
            assert turns == self.written[tenant, session_id][-len(turns) :]
            assert len(turns) <= LIMITS.max_turns
            assert len(turns) == 1 or sum(each.text_bytes for each in turns) <= LIMITS.max_bytes
            assert self.clock.seconds < self.last[tenant, session_id] + LIMITS.ttl_seconds

        @invariant()
        def lists_are_bounded(self) -> None:
            listed = {tenant: self.runner.run(self.store.list(tenant)) for tenant in OWNERS}
            assert all(len(summaries) <= LIMITS.max_sessions for summaries in listed.values())
            assert self.runner.run(count(self.store)) == sum(map(len, listed.values()))
            for tenant, summaries in listed.items():
                assert all((tenant, summary.session_id) in self.written for summary in summaries)

    run_state_machine_as_test(Model, settings=examples(30 if factory is memory else 10, stateful_step_count=20))
