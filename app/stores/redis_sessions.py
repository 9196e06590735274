"""Sessions in Redis, shared by all replicas: turns are appended whole, in one step of the server.

A session is a list of turns, each encoded and encrypted for itself, a list of their sizes, by which the server trims
the first, and a hash with its dates.  Where Redis does not answer there is an error and not an empty session.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from weakref import WeakValueDictionary

import msgspec
from cachetools import TTLCache

from app.config import ChatHistoryConfig
from app.errors import SessionTakenOver, SessionUnreadable, StoreUnavailable
from app.generation.sessions import Session, SessionSummary, Turn, whole_turns
from app.stores.encryption import Encryption, UnreadableValue
from app.stores.redis_connection import RedisConnection, Script
from app.stores.redis_turns import LEASE_SECONDS, RedisTurns
from app.stores.tenant_scripts import COUNT, DELETE, PRELUDE, date_of, digest, key_part, microseconds
from app.types import Role, Tenant

MAX_SESSION_BYTES = 64 * 1024 * 1024
"""A session that is stored as more than this is not ours, and is not read."""
COUNT_SECONDS = 30.0
"""How often sessions are counted."""
MAX_TENANTS = 10_000
"""Tenants of which this process remembers that Redis lists them."""

_FENCE = """
local token, latest = ARGV[3], tonumber(ARGV[4])
if token ~= '' and (redis.call('HGET', at('lock', id), 'owner') ~= token or time > latest) then return -1 end
"""
_APPEND = """
local ttl, max_turns, max_bytes, max_sessions = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
drop_expired()
if not is_live(id) then forget(id) end
local info, turns, sizes = at('info', id), at('turns', id), at('sizes', id)
for i = 10, #ARGV, 2 do
  redis.call('RPUSH', sizes, ARGV[i])
  redis.call('RPUSH', turns, ARGV[i + 1])
end

-- A size with a plus sign is that of a turn which continues the one before it; together they are one.
local all, starts, total = redis.call('LRANGE', sizes, 0, -1), {}, 0
for i, size in ipairs(all) do
  if string.sub(size, 1, 1) ~= '+' then starts[#starts + 1] = i end
end
if #starts == 0 then starts[1] = #all end
local first = math.max(1, #starts - max_turns + 1)
for i = starts[first], #all do total = total + tonumber(all[i]) end
while total > max_bytes and first < #starts do
  for i = starts[first], starts[first + 1] - 1 do total = total - tonumber(all[i]) end
  first = first + 1
end
redis.call('LTRIM', sizes, starts[first] - 1, -1)
redis.call('LTRIM', turns, starts[first] - 1, -1)

redis.call('HSETNX', info, 'created', now)
redis.call('HSET', info, 'updated', now, 'expires', now + ttl, 'name', ARGV[9], 'turns', #starts - first + 1,
  'bytes', total)
for _, key in ipairs({info, turns, sizes}) do redis.call('PEXPIRE', key, ttl / 1000) end
change(id, ttl / 1000)
drop_unused(tonumber(max_sessions))
return 1
"""
_READ = """
if not is_live(id) then return nil end
use(id)
local info = redis.call('HMGET', at('info', id), 'created', 'updated', 'expires', 'title')
local turns, total = redis.call('LRANGE', at('turns', id), 0, -1), 0
for _, turn in ipairs(turns) do total = total + #turn end
if total > tonumber(ARGV[3]) then turns = {} end
return {info[1] or '', info[2] or '', info[3] - now, info[4], turns}
"""
_RENAME = """
if not is_live(id) then return 0 end
use(id)
redis.call('HSET', at('info', id), 'title', ARGV[3])
return 1
"""
_LIST = """
drop_expired()
local found = {}
for _, record in ipairs(redis.call('ZREVRANGE', base .. ':changed', 0, -1)) do
  if is_live(record) then
    local info = redis.call('HMGET', at('info', record), 'name', 'turns', 'bytes', 'updated', 'title')
    table.insert(info, 1, record)
    found[#found + 1] = info
  end
end
return found
"""
_APPEND_SCRIPT, _DELETE_SCRIPT = Script(PRELUDE + _FENCE + _APPEND), Script(PRELUDE + _FENCE + DELETE)
_READ_SCRIPT, _LIST_SCRIPT, _COUNT_SCRIPT = (Script(PRELUDE + body) for body in (_READ, _LIST, COUNT))
_RENAME_SCRIPT = Script(PRELUDE + _RENAME)
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Turn)


class RedisSessionStore:
    """Sessions of all replicas; they end with Redis' own memory, unless it keeps a file."""

    def __init__(
        self,
        connection: RedisConnection,
        config: ChatHistoryConfig,
        encryption: Encryption,
        *,
        lease_seconds: float = LEASE_SECONDS,
        wall_clock: Callable[[], datetime] | None = None,
    ) -> None:
        """Args:
        lease_seconds: after which the turn of a dead replica is over.
        wall_clock: aware UTC time, for dates and the time to live; None is Redis' own.
        """
        self._connection = connection
        self._config = config
        self._encryption = encryption
        self._wall_clock = wall_clock
        self._turns = RedisTurns(connection, lease_seconds=lease_seconds)
        self._locks: WeakValueDictionary[tuple[Tenant, str], asyncio.Lock] = WeakValueDictionary()
        self._fences: dict[tuple[Tenant, str], str] = {}
        """The tokens of the turns that run in this process."""
        self._tenants = connection.key("session-tenants", "all")
        self._listed: TTLCache[str, bool] = TTLCache(MAX_TENANTS, min(COUNT_SECONDS, config.ttl_seconds / 2))
        self._count = 0

    async def read(self, tenant: Tenant, session_id: str) -> Session | None:
        session = key_part(session_id)
        found = await self._connection.evaluate(
            _READ_SCRIPT, [self._base(tenant)], [session, self._now, MAX_SESSION_BYTES]
        )
        if found is None:
            return None
        created, updated, left, title, stored = found
        try:
            turns = [self._decoded(each, tenant, session) for each in stored]
            dates = date_of(int(created)), date_of(int(updated))
            shown = self._title(title, tenant, session)
        except (UnreadableValue, ValueError, OverflowError):
            raise SessionUnreadable() from None
        if not turns:
            raise SessionUnreadable()
        return Session(session_id, whole_turns(turns) or tuple(turns[-1:]), *dates, left / 1e6, shown)

    async def append(self, tenant: Tenant, session_id: str, *turns: Turn) -> None:
        session = key_part(session_id)
        name = self._encryption.encrypt(session_id.encode(), _place("name", tenant, session))
        limits = (self._config.max_turns, self._config.max_bytes, self._config.max_sessions)
        sized = [part for turn in turns for part in (_size(turn), self._encoded(turn, tenant, session))]
        done = await self._connection.evaluate(
            _APPEND_SCRIPT,
            [self._base(tenant)],
            [session, self._now, *self._fence(tenant, session_id), self._ttl, *limits, name, *sized],
        )
        if done < 0:
            raise SessionTakenOver()
        await self._list_tenant(self._base(tenant))

    async def rename(self, tenant: Tenant, session_id: str, title: str) -> bool:
        session = key_part(session_id)
        stored = self._encryption.encrypt(title.encode("utf-8", "surrogatepass"), _place("title", tenant, session))
        arguments = (session, self._now, stored)
        return bool(await self._connection.evaluate(_RENAME_SCRIPT, [self._base(tenant)], arguments))

    async def delete(self, tenant: Tenant, session_id: str) -> bool:
        arguments = (key_part(session_id), self._now, *self._fence(tenant, session_id))
        deleted: int = await self._connection.evaluate(_DELETE_SCRIPT, [self._base(tenant)], arguments)
        if deleted < 0:
            raise SessionTakenOver()
        return deleted > 0

    async def list(self, tenant: Tenant) -> Sequence[SessionSummary]:
        found = await self._connection.evaluate(_LIST_SCRIPT, [self._base(tenant)], ["", self._now])
        summaries = (self._summary(tenant, *each) for each in found)
        return [summary for summary in summaries if summary is not None]

    @asynccontextmanager
    async def turn(self, tenant: Tenant, session_id: str) -> AsyncIterator[None]:
        # In this process asyncio's lock is fair; whoever has it stands in the line of the replicas.
        lock = self._locks.setdefault((tenant, session_id), asyncio.Lock())
        async with lock, self._turns.hold(self._base(tenant), key_part(session_id)) as token:
            self._fences[tenant, session_id] = token
            try:
                yield
            finally:
                del self._fences[tenant, session_id]

    def count(self) -> int:
        return self._count

    async def close(self) -> None:
        """End what this process still does for turns that are over."""
        await self._turns.close()

    async def refresh_count(self) -> None:
        """Count the sessions of all tenants.  Raises: StoreUnavailable: Redis does not answer."""
        await self._connection.execute("ZREMRANGEBYSCORE", self._tenants, "-inf", time.time())
        bases = await self._connection.execute("ZRANGE", self._tenants, 0, -1)
        count = 0
        for base in bases:
            count += await self._connection.evaluate(_COUNT_SCRIPT, [base.decode()], ["", self._now])
        self._count = count

    async def _list_tenant(self, base: str) -> None:
        """Note that a tenant has sessions, for those who count them."""
        if base in self._listed:
            return
        until = time.time() + self._config.ttl_seconds + COUNT_SECONDS
        with suppress(StoreUnavailable):
            await self._connection.execute("ZADD", self._tenants, until, base)
            self._listed[base] = True

    def _base(self, tenant: Tenant) -> str:
        return self._connection.key("sessions", key_part(str(tenant)))

    def _fence(self, tenant: Tenant, session_id: str) -> tuple[str, int]:
        return self._fences.get((tenant, session_id), ""), self._turns.latest

    @property
    def _now(self) -> int:
        return 0 if self._wall_clock is None else microseconds(self._wall_clock())

    @property
    def _ttl(self) -> int:
        return int(self._config.ttl_seconds * 1e6)

    def _encoded(self, turn: Turn, tenant: Tenant, session: str) -> bytes:
        return self._encryption.encrypt(_ENCODER.encode(turn), _place("turn", tenant, session))

    def _decoded(self, stored: bytes, tenant: Tenant, session: str) -> Turn:
        """Raises: ValueError: it is no turn of this session."""
        turn = _DECODER.decode(self._encryption.decrypt(stored, _place("turn", tenant, session)))
        if not turn.messages:
            raise UnreadableValue("has no messages")
        return turn

    def _title(self, stored: bytes | None, tenant: Tenant, session: str) -> str | None:
        """Raises: ValueError: it is no title of this session."""
        if stored is None:
            return None
        return self._encryption.decrypt(stored, _place("title", tenant, session)).decode("utf-8", "surrogatepass")

    def _summary(
        self,
        tenant: Tenant,
        session: bytes,
        name: bytes,
        turns: bytes,
        text_bytes: bytes,
        updated: bytes,
        title: bytes | None,
    ) -> SessionSummary | None:
        """Return a session of the list; None where what is stored cannot be read."""
        try:
            return SessionSummary(
                session_id=self._encryption.decrypt(name, _place("name", tenant, session.decode())).decode(),
                turns=int(turns),
                text_bytes=int(text_bytes),
                updated=date_of(int(updated)),
                title=self._title(title, tenant, session.decode()),
            )
        except (ValueError, TypeError, OverflowError):
            return None


def _size(turn: Turn) -> str:
    """Return the bytes of a turn's text, signed where it continues the turn before it."""
    return f"+{turn.text_bytes}" if turn.messages[0].role is Role.TOOL else str(turn.text_bytes)


def _place(kind: str, tenant: Tenant, session: str) -> bytes:
    return digest(kind, str(tenant), session)
