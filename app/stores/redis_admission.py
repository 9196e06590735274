"""Rate limits and parallel places that all processes share, in Redis; and this process's share of them without it."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from uuid import uuid4

from app.access.admission_store import Decision, Levels, Rates, Refusal
from app.access.token_bucket import Bucket, BucketState
from app.errors import StoreUnavailable
from app.stores.memory_admission import MemoryAdmissionStore
from app.stores.redis_buckets import LUA, RedisBuckets
from app.stores.redis_connection import RedisConnection, Script

_REFUSALS = {0: None, 1: Refusal.REQUESTS, 2: Refusal.PARALLEL, 3: Refusal.TOKENS}
_RENEWALS = 4
"""In the time of a lease."""

_ADMIT = Script(
    LUA
    + """
local limits, places = KEYS[1], KEYS[2]
local request_capacity, request_rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local token_capacity, token_rate = tonumber(ARGV[3]), tonumber(ARGV[4])
local parallel, place, lease = tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])

local requests, tokens = 0, 0
if request_capacity > 0 then requests = level(limits, 'requests', request_capacity, request_rate) end
if token_capacity > 0 then tokens = level(limits, 'tokens', token_capacity, token_rate) end
local function outcome(refusal) return {refusal, shown(requests), shown(tokens)} end

if request_capacity > 0 then
  if requests < 1 then return outcome(1) end
  requests = requests - 1
  save(limits, 'requests', requests, request_capacity, request_rate)
end
if parallel > 0 then
  redis.call('ZREMRANGEBYSCORE', places, '-inf', now)
  if redis.call('ZCARD', places) >= parallel then return outcome(2) end
end
if token_capacity > 0 and tokens < 1 then return outcome(3) end
if parallel > 0 then
  redis.call('ZADD', places, now + lease, place)
  redis.call('PEXPIRE', places, math.ceil(lease * 1000))
end
return outcome(0)
"""
)

_RENEW = Script(
    """
local time = redis.call('TIME')
local lease = tonumber(ARGV[1])
for number = 2, #ARGV do
  redis.call('ZADD', KEYS[1], tonumber(time[1]) + tonumber(time[2]) / 1000000 + lease, ARGV[number])
end
redis.call('PEXPIRE', KEYS[1], math.ceil(lease * 1000))
"""
)


class RedisAdmissionStore:
    """The `AdmissionStore` of several processes; each method raises `StoreUnavailable` while Redis is away.

    A place is leased, and the process that has it renews the lease: the places of one that dies are free again after
    it, and a Redis that was restarted empty knows the places that are taken after a quarter of it.
    """

    def __init__(self, connection: RedisConnection, *, lease_seconds: float) -> None:
        self._connection = connection
        self._lease_seconds = lease_seconds
        self._buckets = RedisBuckets(connection)
        self._places: set[str] = set()
        """Taken by this process."""

    async def admit(self, key_id: str, rates: Rates) -> Decision:
        if rates == Rates():
            return Decision(Levels(None, None))
        parallel = rates.parallel_requests
        place = f"{uuid4().hex}:{key_id}"
        keys = [self._limits_key(key_id), self._places_key(key_id)]
        args = (*_args(rates.requests), *_args(rates.tokens), parallel, place, self._lease_seconds)
        try:
            number, requests, tokens = await self._connection.evaluate(_ADMIT, keys, args)
        except asyncio.CancelledError:
            if parallel:
                await self.leave(place)
            raise
        refused = _REFUSALS[number]
        first = refused is not Refusal.REQUESTS
        levels = Levels(
            rates.requests.outcome(float(requests), 1, granted=first) if rates.requests else None,
            rates.tokens.outcome(float(tokens), 0, granted=True) if rates.tokens else None,
        )
        if refused or not parallel:
            return Decision(levels, refused=refused)
        self._places.add(place)
        return Decision(levels, place=place)

    async def leave(self, place: str) -> None:
        self._places.discard(place)
        self._connection.post_command("ZREM", self._places_key(_owner(place)), place)

    async def take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> BucketState:
        return await self._buckets.take(self._limits_key(key_id), "tokens", bucket, tokens)

    async def return_tokens(self, key_id: str, bucket: Bucket, tokens: int, *, local: bool = False) -> None:
        self._buckets.put_back(self._limits_key(key_id), "tokens", bucket, tokens)

    async def peek(self, key_id: str, rates: Rates) -> Levels:
        async def level(field: str, bucket: Bucket | None) -> BucketState | None:
            return await self._buckets.take(self._limits_key(key_id), field, bucket, 0) if bucket else None

        return Levels(*await asyncio.gather(level("requests", rates.requests), level("tokens", rates.tokens)))

    async def renew_leases(self) -> None:
        """Renew the leases of the places that this process has; runs until it is cancelled."""
        while True:
            await asyncio.sleep(self._lease_seconds / _RENEWALS)
            with suppress(StoreUnavailable):
                await self._renew()

    async def _renew(self) -> None:
        places: dict[str, list[str]] = defaultdict(list)
        for place in self._places:
            places[_owner(place)].append(place)
        for key_id, held in places.items():
            # One that is left meanwhile is left after this: commands keep their order.
            still = [place for place in held if place in self._places]
            if still:
                await self._connection.evaluate(_RENEW, [self._places_key(key_id)], (self._lease_seconds, *still))

    def _limits_key(self, key_id: str) -> str:
        return self._connection.key("limits", key_id)

    def _places_key(self, key_id: str) -> str:
        return self._connection.key("places", key_id)


def _args(bucket: Bucket | None) -> tuple[int, float]:
    return (bucket.capacity, bucket.per_second) if bucket else (0, 0.0)


def _owner(place: str) -> str:
    """Return the id of the key that has a place."""
    return place.partition(":")[2]


_LOCAL = "local:"


class AdmissionStoreWithFallback:
    """The limits of all processes while Redis answers, and this process's share of them while it does not.

    Places are left, and tokens put back, where they were taken, whatever Redis does by then.
    """

    def __init__(
        self, shared: RedisAdmissionStore, local: MemoryAdmissionStore, *, processes: int, closed: bool = False
    ) -> None:
        """Args:
        processes: among which the limits are divided.
        closed: refuse requests while Redis is away.
        """
        self._shared = shared
        self._local = local
        self._processes = processes
        self._closed = closed

    async def admit(self, key_id: str, rates: Rates) -> Decision:
        try:
            return await self._shared.admit(key_id, rates)
        except StoreUnavailable:
            if self._closed:
                raise
        decision = await self._local.admit(key_id, rates.share(self._processes))
        return replace(decision, place=f"{_LOCAL}{decision.place}" if decision.place else None)

    async def leave(self, place: str) -> None:
        if place.startswith(_LOCAL):
            await self._local.leave(place.removeprefix(_LOCAL))
        else:
            await self._shared.leave(place)

    async def take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> BucketState:
        try:
            return await self._shared.take_tokens(key_id, bucket, tokens)
        except StoreUnavailable:
            if self._closed:
                raise
        state = await self._local.take_tokens(key_id, bucket.share(self._processes), tokens)
        return replace(state, local=True)

    async def return_tokens(self, key_id: str, bucket: Bucket, tokens: int, *, local: bool = False) -> None:
        if local:
            await self._local.return_tokens(key_id, bucket.share(self._processes), tokens)
        else:
            await self._shared.return_tokens(key_id, bucket, tokens)

    async def peek(self, key_id: str, rates: Rates) -> Levels:
        try:
            return await self._shared.peek(key_id, rates)
        except StoreUnavailable:
            if self._closed:  # the headers of a response are no reason to fail it
                return Levels(None, None)
        return await self._local.peek(key_id, rates.share(self._processes))
