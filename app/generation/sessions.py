"""Session memory: the turns of conversations, with their limits of time, number and bytes.

A session belongs to (tenant, session id), so no tenant can name another's.  Turns are stored and dropped whole.  The
service reads a session, generates and appends the turn; texts arrive here after the input filter and as they were sent
to the client.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Any, Protocol
from weakref import WeakValueDictionary

from app.config import ChatHistoryConfig
from app.errors import DeadlineExceeded, InvalidRequest
from app.generation.tenant_cache import TenantCache
from app.types import Message, Role, Tenant


@dataclass(frozen=True, slots=True)
class Turn:
    """The caller's messages and the assistant's response to them; never a system message."""

    messages: tuple[Message, ...]

    @property
    def text_bytes(self) -> int:
        """Its text in UTF-8: what was said, thought and handed to tools."""
        return sum(len(message.all_text.encode("utf-8", "surrogatepass")) for message in self.messages)


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation as it is stored."""

    session_id: str
    turns: tuple[Turn, ...]
    """Oldest first; at least one."""
    created: datetime
    """When the first turn was stored, UTC."""
    updated: datetime
    """When the last turn was stored, UTC."""
    expires_in_seconds: float
    """Until it is forgotten, unless another turn is stored."""
    title: str | None = None
    """None until it is given one."""


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session without its text."""

    session_id: str
    turns: int
    text_bytes: int
    updated: datetime
    title: str | None = None


class SessionStore(Protocol):
    """Keeps sessions.  `tests/contract/test_session_store.py` holds every store to the same promises.

    Every method but `count` raises StoreUnavailable where the store is on another machine and does not answer.
    """

    async def read(self, tenant: Tenant, session_id: str) -> Session | None:
        """Return the session, None where this tenant has none of that id (or no longer).

        Raises: SessionUnreadable: what is stored of it is damaged, or cannot be decrypted.
        """

    async def append(self, tenant: Tenant, session_id: str, *turns: Turn) -> None:
        """Add turns at the end, all of them or none, and begin the time to live anew.

        One that begins with what a tool said continues the turn before it.  The oldest turns go where there are too
        many or too much text, the newest never; and the tenant's least recently used session where there are too many.

        Raises: SessionTakenOver: another replica has begun a turn in the session since this one's began.
        """

    async def rename(self, tenant: Tenant, session_id: str, title: str) -> bool:
        """Give the session a title, which changes nothing else of it; return whether there is one."""

    async def delete(self, tenant: Tenant, session_id: str) -> bool:
        """Forget the session; return whether there was one."""

    async def list(self, tenant: Tenant) -> Sequence[SessionSummary]:
        """Return the tenant's sessions, the last updated first."""

    def turn(self, tenant: Tenant, session_id: str) -> AbstractAsyncContextManager[None]:
        """Hold the session for one turn; others wait, first come, first served."""

    def count(self) -> int:
        """Return how many sessions of all tenants are stored, as far as is known; never blocks."""


@dataclass(slots=True)
class _StoredSession:
    turns: tuple[Turn, ...]
    text_bytes: int
    created: datetime
    updated: datetime
    expires: float
    title: str | None


def _now() -> datetime:
    return datetime.now(UTC)


class MemorySessionStore:
    """Sessions in this process; a restart forgets them."""

    def __init__(
        self,
        config: ChatHistoryConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = _now,
    ) -> None:
        """Args:
        clock: seconds, for the time to live; never runs backwards.
        wall_clock: aware UTC time, for `created` and `updated`.
        """
        self._config = config
        self._clock = clock
        self._wall_clock = wall_clock
        self._sessions = TenantCache[_StoredSession](
            most=config.max_sessions, ttl_seconds=config.ttl_seconds, clock=clock
        )
        self._locks: WeakValueDictionary[tuple[Tenant, str], asyncio.Lock] = WeakValueDictionary()

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """Return the tenants that have sessions in memory, the one with the oldest last turn first."""
        return self._sessions.tenants

    @property
    def locks(self) -> int:
        """Return how many sessions are being used, or waited for, by a turn."""
        return len(self._locks)

    async def read(self, tenant: Tenant, session_id: str) -> Session | None:
        stored = self._sessions.get(tenant, session_id)
        if stored is None:
            return None
        return Session(
            session_id=session_id,
            turns=stored.turns,
            created=stored.created,
            updated=stored.updated,
            expires_in_seconds=max(0.0, stored.expires - self._clock()),
            title=stored.title,
        )

    async def append(self, tenant: Tenant, session_id: str, *turns: Turn) -> None:
        before = self._sessions.get(tenant, session_id)
        turns = newest_turns((*before.turns, *turns) if before else turns, self._config)
        now = self._wall_clock()
        self._sessions.put(
            tenant,
            session_id,
            _StoredSession(
                turns=turns,
                text_bytes=sum(each.text_bytes for each in turns),
                created=before.created if before else now,
                updated=now,
                expires=self._clock() + self._config.ttl_seconds,
                title=before.title if before else None,
            ),
        )

    async def rename(self, tenant: Tenant, session_id: str, title: str) -> bool:
        stored = self._sessions.get(tenant, session_id)
        if stored is None:
            return False
        # In place: to put it anew would begin its time to live again.
        stored.title = title
        return True

    async def delete(self, tenant: Tenant, session_id: str) -> bool:
        return self._sessions.delete(tenant, session_id)

    async def list(self, tenant: Tenant) -> Sequence[SessionSummary]:
        return [
            SessionSummary(
                session_id=session_id,
                turns=len(each.turns),
                text_bytes=each.text_bytes,
                updated=each.updated,
                title=each.title,
            )
            for session_id, each in self._sessions.items(tenant)
        ]

    @asynccontextmanager
    async def turn(self, tenant: Tenant, session_id: str) -> AsyncIterator[None]:
        # asyncio's lock is fair and safe to cancel; it lives as long as somebody holds or awaits it.
        lock = self._locks.setdefault((tenant, session_id), asyncio.Lock())
        async with lock:
            yield

    def count(self) -> int:
        return len(self._sessions)


def newest_turns(turns: Sequence[Turn], config: ChatHistoryConfig) -> tuple[Turn, ...]:
    """Return the newest turns that the limits of a conversation allow, at least one.

    What a tool said, and the answer to it, continues the turn that called it: an agent's loop counts as one turn, so
    that it never loses the question that it is about.
    """
    newest = (whole_turns(turns) or tuple(turns[-1:]))[-config.max_turns :]
    sizes = [turn.text_bytes for turn in newest]
    first, total = 0, sum(sizes)
    while total > config.max_bytes and first < len(newest) - 1:
        total -= sizes[first]
        first += 1
    return newest[first:]


@asynccontextmanager
async def turn_within(seconds: float, sessions: SessionStore, tenant: Tenant, session_id: str) -> AsyncIterator[None]:
    """Hold a session for one turn.

    Raises: DeadlineExceeded: the turns before it take longer than so many seconds.
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(seconds):
                await stack.enter_async_context(sessions.turn(tenant, session_id))
        except TimeoutError:
            raise DeadlineExceeded("The turn before this one in the session takes too long.") from None
        yield


def new_messages(history: Sequence[Turn], messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return which of a request's messages the session does not have yet, without system messages.

    Some clients send the whole conversation every time, also turns that the session has dropped since.  So where the
    stored conversation stands in the request, word for word and from its first to its last message, only what follows
    is new; else everything is.  Clients leave out what the assistant thought, and write arguments in their own way.
    """
    spoken = tuple(_without_system(messages))
    stored = [_compared(message) for message in _without_system(each for turn in history for each in turn.messages)]
    if stored:
        given = [_compared(message) for message in spoken]
        # The last match that leaves something new: a session stores the end of its conversation.
        for start in reversed(range(len(given) - len(stored))):
            end = start + len(stored)
            if given[start:end] == stored:
                return spoken[end:]
    return spoken


def _compared(message: Message) -> tuple[Any, ...]:
    """Return by what a message is recognised when a client sends it again."""
    calls = tuple((call.id, call.name, _value(call.arguments)) for call in message.tool_calls)
    return message.role, message.content, calls, message.tool_call_id


def _value(arguments: str) -> str:
    """Return a JSON text without what makes no difference; one that is cut stays as it is."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def split_messages(messages: Sequence[Message], count: int) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return what stands before the history in a prompt, which is system messages only, and what behind it.

    Behind it are the last `count` messages that are not the system's, and the system messages from the history on.

    Args: count: how many messages the session does not have yet.
    """
    spoken = [place for place, message in enumerate(messages) if message.role is not Role.SYSTEM]
    known = spoken[: len(spoken) - count]
    # Without any message that the session has, the history begins behind the system messages at the beginning.
    start = known[-1] + 1 if known else next(iter(spoken), len(messages))
    before = (message for message in messages[:start] if message.role is Role.SYSTEM)
    return tuple(before), tuple(messages[start:])


def as_turns(messages: Sequence[Message]) -> list[Turn]:
    """Split a conversation in front of each user message, without system messages."""
    turns: list[list[Message]] = []
    for message in _without_system(messages):
        if message.role is Role.USER or not turns:
            turns.append([])
        turns[-1].append(message)
    return [Turn(tuple(turn)) for turn in turns]


def whole_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return a session's turns so that each begins with a user's message where it can.

    The results of tools are sent, and stored, after the turn that called them, and belong to it; without it they answer
    nothing, and go.
    """
    whole: list[Turn] = []
    for turn in turns:
        if turn.messages[0].role is not Role.TOOL:
            whole.append(turn)
        elif whole:
            whole[-1] = Turn((*whole[-1].messages, *turn.messages))
    return tuple(whole)


def answered_turn(history: Sequence[Turn], new: Sequence[Message]) -> tuple[Sequence[Turn], tuple[Message, ...]]:
    """Return history and new messages so that results of tools stand behind their calls, whatever has to go.

    Raises: InvalidRequest: a result answers no call of the turn before.
    """
    results = list(takewhile(lambda message: message.role is Role.TOOL, _without_system(new)))
    if not results:
        return history, tuple(new)
    last = history[-1].messages if history else ()
    called = {call.id for message in last for call in message.tool_calls}
    if not called.issuperset(each.tool_call_id for each in results if each.tool_call_id is not None):
        raise InvalidRequest.of_field("messages", "hold a tool's result for a call that the session does not end with")
    return history[:-1], (*last, *new)


def _without_system(messages: Iterable[Message]) -> Iterable[Message]:
    return (message for message in messages if message.role is not Role.SYSTEM)
