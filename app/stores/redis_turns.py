"""The turn lock of sessions across replicas: one turn at a time, first come, first served.

Whoever holds a session has a token in Redis, which is its fence: what it stores is refused once another has taken the
session.  The lock lasts for a lease that is renewed while the turn runs, so that of a dead replica ends by itself.
Waiters stand in a line in Redis, one for each replica and session, and ask until it is their turn; one that stops
asking loses its place.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

from app.errors import StoreUnavailable
from app.stores.redis_connection import RedisConnection, Script

LEASE_SECONDS = 5.0
FENCE_SECONDS = 600.0
"""How long a turn whose lease has ended may still be stored, if nobody has taken the session."""
PATIENCE_SECONDS = 1.0
"""A waiter that has not asked for so long is gone."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.1
RETRY_SECONDS = 0.5
LATE_SECONDS = 0.5
"""A command that Redis runs later than this after it was sent takes and stores nothing: its sender has given up."""

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
local lease, fence, patience, latest = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if latest > 0 and time > latest then return -time end
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


class RedisTurns:
    """Holds sessions for one replica; of its own requests one at a time asks for a session."""

    def __init__(self, connection: RedisConnection, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._lease_seconds = lease_seconds
        self._connection = connection
        self._ahead: float | None = None
        """Redis' clock less this process' own, as last seen."""
        self._times = (int(lease_seconds * 1e6), int(max(FENCE_SECONDS, lease_seconds) * 1e6))
        self._releasing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def hold(self, base: str, session: str) -> AsyncIterator[str]:
        """Hold a session; yields the token, which is its fence.

        Args: base: the name that all keys of its tenant begin with.
        Raises: StoreUnavailable: Redis does not answer.
        """
        token = uuid4().hex
        renewing: asyncio.Task[None] | None = None
        try:
            await self._wait(base, session, token)
            renewing = asyncio.create_task(self._keep(base, session, token))
            yield token
        finally:
            if renewing is not None:
                renewing.cancel()
            # Whoever is cancelled here would leave the session locked.
            await asyncio.shield(self._spawn(self._free(base, session, token)))

    async def close(self) -> None:
        """Leave what could not be freed yet to its lease."""
        for task in self._releasing:
            task.cancel()
        await asyncio.gather(*self._releasing, return_exceptions=True)

    @property
    def latest(self) -> int:
        """Return until when, in Redis' microseconds, a command that is sent now may change something; 0: unknown."""
        return 0 if self._ahead is None else int((time.monotonic() + self._ahead + LATE_SECONDS) * 1e6)

    def _see(self, redis_time: int, sent: float) -> None:
        # By when it was sent, and not by when the reply was read: a busy process must not take itself for late.
        self._ahead = redis_time / 1e6 - sent

    async def _wait(self, base: str, session: str, token: str) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        arguments = (session, token, *self._times, int(PATIENCE_SECONDS * 1e6))
        while True:
            sent = time.monotonic()
            redis_time = await self._connection.evaluate(_TAKE, [base], [*arguments, self.latest])
            if redis_time:
                self._see(abs(redis_time), sent)
            if redis_time > 0:
                return
            if not redis_time:  # else Redis' clock has been set, and the next attempt counts with that
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE_SECONDS, pause * 1.5)

    async def _keep(self, base: str, session: str, token: str) -> None:
        """Renew the lease until cancelled, or until another has taken the session."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            sent = time.monotonic()
            with suppress(StoreUnavailable):
                redis_time = await self._connection.evaluate(_RENEW, [base], [session, token, *self._times])
                if not redis_time:
                    return
                self._see(redis_time, sent)

    async def _free(self, base: str, session: str, token: str) -> None:
        with suppress(StoreUnavailable):
            await self._connection.evaluate(_RELEASE, [base], [session, token])
            return
        self._spawn(self._free_later(base, session, token))

    async def _free_later(self, base: str, session: str, token: str) -> None:
        """Try again while the lease lasts, so that the session is free as soon as Redis is back."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._lease_seconds):
                while True:
                    await asyncio.sleep(RETRY_SECONDS)
                    with suppress(StoreUnavailable):
                        await self._connection.evaluate(_RELEASE, [base], [session, token])
                        return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task
