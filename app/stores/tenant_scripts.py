"""What the Lua scripts of sessions and stored responses share: a tenant's records, with their order and their time.

All keys of a tenant begin with one name, which is the script's only declared key, and in a cluster are on one server.
Its records are hashes, found by a digest of their id; the names of keys tell nothing of tenants and ids.  Two sorted
sets hold their order by the last change and by the last use, by rank and not by time, so that no two are equal.
"""

from datetime import UTC, datetime, timedelta
from hashlib import sha256

PRELUDE = """
local base, id, now = KEYS[1], ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
time = time[1] * 1000000 + time[2]
if now == 0 then now = time end

local function at(kind, record) return base .. ':' .. kind .. ':' .. record end

local function is_live(record)
  return now < tonumber(redis.call('HGET', at('info', record), 'expires') or '0')
end

local function forget(record)
  redis.call('ZREM', base .. ':changed', record)
  redis.call('ZREM', base .. ':used', record)
  redis.call('HDEL', base .. ':bytes', record)
  redis.call('UNLINK', at('info', record), at('turns', record), at('sizes', record))
end

local function drop_expired()
  while true do
    local oldest = redis.call('ZRANGE', base .. ':changed', 0, 0)[1]
    if not oldest or is_live(oldest) then return end
    forget(oldest)
  end
end

local function next_rank()
  local rank = 0
  for _, order in ipairs({':changed', ':used'}) do
    local last = redis.call('ZRANGE', base .. order, -1, -1, 'WITHSCORES')[2]
    rank = math.max(rank, tonumber(last or '0'))
  end
  return rank + 1
end

local function use(record)
  redis.call('ZADD', base .. ':used', 'XX', next_rank(), record)
end

local function change(record, ttl)
  local rank = next_rank()
  for _, order in ipairs({':changed', ':used'}) do
    redis.call('ZADD', base .. order, rank, record)
    redis.call('PEXPIRE', base .. order, ttl)
  end
end

local function drop_unused(most)
  while redis.call('ZCARD', base .. ':used') > most do
    forget(redis.call('ZRANGE', base .. ':used', 0, 0)[1])
  end
end
"""
"""Begins a script whose arguments begin with a record's name and the time in microseconds, 0 for that of Redis."""

DELETE = """
local live = is_live(id)
forget(id)
return live and 1 or 0
"""
COUNT = """
drop_expired()
return redis.call('ZCARD', base .. ':changed')
"""
"""Follow the prelude."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(date: datetime) -> int:
    """Return a date as scripts count time."""
    return (date - _EPOCH) // timedelta(microseconds=1)


def date_of(microseconds: int) -> datetime:
    """Return the date of a script's time, UTC.  Raises: OverflowError: there is none so far away."""
    return _EPOCH + timedelta(microseconds=microseconds)


def digest(*names: str) -> bytes:
    """Return a digest of names, of each for itself."""
    return sha256(repr(names).encode("utf-8", "surrogatepass")).digest()


def key_part(*names: str) -> str:
    """Return what stands for names in a key."""
    return digest(*names).hex()[:32]
