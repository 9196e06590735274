"""The turn lock of sessions across replicas: one turn at a time, first come, first served.

Whoever holds a session has a token in Redis, which is its fence: what it stores is refused once another has taken the
session.  The lock lasts for a lease that is renewed while the turn runs, so that of a dead replica ends by itself.
Waiters stand in a line in Redis, one for each replica and session, and ask until it is their turn; one that stops
asking loses its place.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from uuid import uuid4

from app.errors import StoreUnavailable
from app.stores.redis_connection import RedisConnection, Script

LEASE_SECONDS = 5.0
FENCE_SECONDS = 600.0
"""How long a turn whose lease has ended may still be stored, if nobody has taken the session."""
PATIENCE_SECONDS = 1.0
"""A waiter that has not asked for so long is gone."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.1
LATE_SECONDS = 1.0
"""A command that Redis runs later than this after it was sent changes nothing: its sender has given up."""

_PRELUDE = """
local base, id, token = KEYS[1], ARGV[1], ARGV[2]
local time = redis.call('TIME')
time = time[1] * 1000000 + time[2]
local lock, line, asked = base .. ':lock:' .. id, base .. ':line:' .. id, base .. ':asked:' .. id
local function leave(waiter)
  redis.call('ZREM', line, waiter)
  redis.call('HDEL', asked, waiter)
end
"""
_TAKE = Script(
    _PRELUDE
    + """
local lease, fence, patience = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local last = redis.call('ZRANGE', line, -1, -1, 'WITHSCORES')[2]
redis.call('ZADD', line, 'NX', tonumber(last or '0') + 1, token)
redis.call('HSET', asked, token, time)
redis.call('PEXPIRE', line, fence / 1000)
redis.call('PEXPIRE', asked, fence / 1000)
while true do
  local first = redis.call('ZRANGE', line, 0, 0)[1]
  if first == token then break end
  if time < tonumber(redis.call('HGET', asked, first) or '0') + patience then return 0 end
  leave(first)
end
if time < tonumber(redis.call('HGET', lock, 'leased_until') or '0') then return 0 end
leave(token)
redis.call('HSET', lock, 'owner', token, 'leased_until', time + lease)
redis.call('PEXPIRE', lock, fence / 1000)
return time
"""
)
_RENEW = Script(
    _PRELUDE
    + """
if redis.call('HGET', lock, 'owner') ~= token then return 0 end
redis.call('HSET', lock, 'leased_until', time + ARGV[3])
redis.call('PEXPIRE', lock, ARGV[4] / 1000)
return time
"""
)
_RELEASE = Script(
    _PRELUDE
    + """
leave(token)
if redis.call('HGET', lock, 'owner') == token then redis.call('UNLINK', lock) end
"""
)


class HeldTurn:
    """A session that a replica holds."""

    def __init__(self, token: str, redis_time: int) -> None:
        self.token = token
        self.see(redis_time)

    def see(self, redis_time: int) -> None:
        """Note what time it is for Redis, in microseconds."""
        self._ahead = redis_time / 1e6 - time.monotonic()

    @property
    def latest(self) -> int:
        """Return until when, in Redis' microseconds, a command that is sent now may still change something."""
        return int((time.monotonic() + self._ahead + LATE_SECONDS) * 1e6)


class RedisTurns:
    """Holds sessions for one replica; of its own requests one at a time asks for a session."""

    def __init__(self, connection: RedisConnection, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._lease_seconds = lease_seconds
        self._connection = connection
        self._times = (int(lease_seconds * 1e6), int(max(FENCE_SECONDS, lease_seconds) * 1e6))
        self._releasing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def hold(self, base: str, session: str) -> AsyncIterator[HeldTurn]:
        """Hold a session.

        Args: base: the name that all keys of its tenant begin with.
        Raises: StoreUnavailable: Redis does not answer.
        """
        token = uuid4().hex
        renewing: asyncio.Task[None] | None = None
        try:
            held = await self._wait(base, session, token)
            renewing = asyncio.create_task(self._keep(base, session, held))
            yield held
        finally:
            if renewing is not None:
                renewing.cancel()
            # Whoever is cancelled here would leave the session locked.
            await asyncio.shield(self._begin_release(base, session, token))

    async def _wait(self, base: str, session: str, token: str) -> HeldTurn:
        pause = SHORTEST_PAUSE_SECONDS
        arguments = [session, token, *self._times, int(PATIENCE_SECONDS * 1e6)]
        while not (redis_time := await self._connection.evaluate(_TAKE, [base], arguments)):
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_SECONDS, pause * 1.5)
        return HeldTurn(token, redis_time)

    async def _keep(self, base: str, session: str, held: HeldTurn) -> None:
        """Renew the lease until cancelled, or until another has taken the session."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            with suppress(StoreUnavailable):
                redis_time = await self._connection.evaluate(_RENEW, [base], [session, held.token, *self._times])
                if not redis_time:
                    return
                held.see(redis_time)

    def _begin_release(self, base: str, session: str, token: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._free(base, session, token))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task

    async def _free(self, base: str, session: str, token: str) -> None:
        with suppress(StoreUnavailable):  # the lease ends by itself
            await self._connection.evaluate(_RELEASE, [base], [session, token])
