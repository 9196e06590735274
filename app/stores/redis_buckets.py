"""Token buckets in Redis, by Redis' own clock."""

from app.access.token_bucket import Bucket, BucketState
from app.stores.redis_connection import RedisConnection, Script
from app.stores.redis_queue import Word

LUA = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000

-- What is no level, or has expired, is a full bucket.
local function level(key, field, capacity, rate)
  local saved = redis.call('HMGET', key, field, field .. ':at')
  local tokens, at = tonumber(saved[1] or ''), tonumber(saved[2] or '')
  if not (tokens and at and tokens >= 0) then return capacity end
  return math.min(capacity, tokens + math.max(0, now - at) * rate)
end

-- A full bucket needs no key, so each lives until it would be full, and a minute.
local function save(key, field, tokens, capacity, rate)
  redis.call('HSET', key, field, string.format('%.17g', tokens), field .. ':at', string.format('%.17g', now))
  local lives = math.ceil((capacity - tokens) / rate * 1000) + 60000
  if redis.call('PTTL', key) < lives then redis.call('PEXPIRE', key, lives) end
end

local function shown(tokens) return string.format('%.17g', tokens) end
"""
"""What every script that takes from a bucket begins with."""

_TAKE = Script(
    LUA
    + """
local key, field, capacity, rate, cost = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local tokens = level(key, field, capacity, rate)
if tokens < cost then return {0, shown(tokens)} end
if cost ~= 0 then
  tokens = math.min(capacity, tokens - cost)
  save(key, field, tokens, capacity, rate)
end
return {1, shown(tokens)}
"""
)


class RedisBuckets:
    """The levels of many buckets; several of one owner are fields of one key."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def take(self, key: str, field: str, bucket: Bucket, cost: int = 1) -> BucketState:
        """Take tokens if there are so many; 0 looks.  Raises: StoreUnavailable: Redis is away."""
        granted, level = await self._connection.evaluate(_TAKE, [key], _args(field, bucket, cost))
        return bucket.outcome(float(level), cost, granted=bool(granted))

    def put_back(self, key: str, field: str, bucket: Bucket, count: int) -> None:
        """Put tokens back, before whatever is taken next; nobody waits for it."""
        self._connection.post(_TAKE, [key], _args(field, bucket, -count))


def _args(field: str, bucket: Bucket, cost: int) -> tuple[Word, ...]:
    return field, bucket.capacity, bucket.per_second, cost


class RedisAddressBuckets:
    """A bucket of each network address."""

    def __init__(self, connection: RedisConnection, kind: str) -> None:
        """Args: kind: what they limit."""
        self._connection = connection
        self._kind = kind
        self._buckets = RedisBuckets(connection)

    async def take(self, address: str, bucket: Bucket) -> BucketState:
        """Take one token if there is one.  Raises: StoreUnavailable: Redis is away."""
        return await self._buckets.take(self._connection.key(self._kind, address), "tokens", bucket)
