"""What is new in a request, how a conversation falls into turns, and that nothing is left of idle sessions."""

import asyncio
import gc
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import ChatHistoryConfig
from app.generation.sessions import MemorySessionStore, Turn, as_turns, new_messages
from app.types import Message, Role, Tenant


def talk(*words: str) -> list[Message]:
    """`talk("u:hi", "a:hello")` is what a user and an assistant said."""
    roles = {"s": Role.SYSTEM, "u": Role.USER, "a": Role.ASSISTANT}
    return [Message(roles[word[0]], word[2:]) for word in words]


def test_a_message_of_its_own_is_new():
    """The usual client sends only what it says now."""
    history = as_turns(talk("u:hi", "a:hello"))

    assert tuple(talk("u:how are you?")) == new_messages(history, talk("u:how are you?"))


def test_a_conversation_sent_again_is_not_new():
    """Only what follows the stored turns is new, whatever system message is in front."""
    history = as_turns(talk("u:hi", "a:hello", "u:well?", "a:well."))
    request = talk("s:Be brief.", "u:hi", "a:hello", "u:well?", "a:well.", "u:bye")

    assert tuple(talk("u:bye")) == new_messages(history, request)


def test_turns_that_the_session_dropped_are_not_new_either():
    """A client that always sends everything does not make a long session double with each request."""
    everything = talk("u:1", "a:1", "u:2", "a:2", "u:3", "a:3", "u:4")
    history = as_turns(everything)[1:3]

    assert tuple(talk("u:4")) == new_messages(history, everything)


def test_a_changed_conversation_is_new_as_a_whole():
    """One word of the past edited: nothing is guessed away."""
    history = as_turns(talk("u:hi", "a:hello"))
    request = talk("u:hi", "a:HELLO", "u:bye")

    assert tuple(request) == new_messages(history, request)


def test_without_a_history_all_but_the_system_message_is_new():
    """A system message belongs to the request and not to the session."""
    assert tuple(talk("u:hi")) == new_messages([], talk("s:Be brief.", "u:hi"))


def test_a_turn_begins_with_a_user_message():
    """Two user messages in a row are two turns; what comes before the first is a turn too."""
    turns = as_turns(talk("a:Welcome", "s:x", "u:1", "u:2", "a:2", "a:more"))

    assert [
        Turn(tuple(talk("a:Welcome"))),
        Turn(tuple(talk("u:1"))),
        Turn(tuple(talk("u:2", "a:2", "a:more"))),
    ] == turns


messages = st.lists(st.builds(Message, st.sampled_from([Role.USER, Role.ASSISTANT]), st.sampled_from("ab")), max_size=8)


@settings(deadline=None)
@given(messages)
def test_turns_lose_no_message(conversation: Sequence[Message]):
    """Laid end to end, the turns are the conversation."""
    assert list(conversation) == [message for turn in as_turns(conversation) for message in turn.messages]


@settings(deadline=None)
@given(messages, messages, st.sampled_from("ab"))
def test_what_follows_a_resent_history_is_all_that_is_new(gone: Sequence[Message], past: Sequence[Message], new: str):
    """For every history, also one that the session has dropped the beginning of, however much of it repeats."""
    question = Message(Role.USER, new)

    expected = (question,) if past else (*gone, question)

    assert expected == new_messages(as_turns(past), [*gone, *past, question])


async def test_idle_locks_and_tenants_leave_nothing_behind():
    """After the last turn has ended, its lock is gone; after the last session has expired, its tenant."""
    seconds = 0.0
    store = MemorySessionStore(ChatHistoryConfig(ttl_seconds=10), clock=lambda: seconds)

    async def one_turn(tenant: Tenant) -> None:
        async with store.turn(tenant, "s"):
            await asyncio.sleep(0)
            await store.append(tenant, "s", as_turns(talk("u:hi", "a:hello"))[0])

    await asyncio.gather(*(one_turn(Tenant.owner(f"tenant {number % 50}")) for number in range(200)))
    gc.collect()
    sessions = store.count()
    seconds = 11.0
    await store.append(Tenant.owner("late"), "s", as_turns(talk("u:hi", "a:hello"))[0])

    assert 50 == sessions
    assert 0 == store.locks
    assert (Tenant.owner("late"),) == store.tenants


async def test_a_busy_tenant_leaves_no_idle_ones_in_memory():
    """Tenants go by the age of their last turn, not of their first; one without sessions goes at once."""
    seconds = 0.0
    store = MemorySessionStore(ChatHistoryConfig(ttl_seconds=10), clock=lambda: seconds)
    turn = as_turns(talk("u:hi", "a:hello"))[0]
    await store.append(Tenant.owner("busy"), "s", turn)
    await store.append(Tenant.owner("idle"), "s", turn)
    seconds = 9.0
    await store.append(Tenant.owner("busy"), "s", turn)

    seconds = 12.0
    await store.read(Tenant.owner("busy"), "s")
    after_expiry = store.tenants
    await store.delete(Tenant.owner("busy"), "s")

    assert (Tenant.owner("busy"),) == after_expiry
    assert () == store.tenants
