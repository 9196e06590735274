"""Stored responses in Redis, shared by all replicas; each with the conversation up to itself, encrypted as a whole."""

from collections.abc import Callable
from datetime import datetime

import msgspec

from app.config import ChatHistoryConfig
from app.errors import SessionUnreadable
from app.generation.responses import TENANT_BYTES, StoredResponse
from app.generation.sessions import Turn, newest_turns
from app.stores.encryption import Encryption, UnreadableValue
from app.stores.redis_connection import RedisConnection, Script
from app.stores.tenant_scripts import DELETE, PRELUDE, digest, key_part, microseconds
from app.types import Tenant

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
"""A response that is stored as more than this is not ours, and is not read."""
_PUT = """
local ttl, most, most_bytes, bytes, value = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
drop_expired()
forget(id)
redis.call('HSET', at('info', id), 'value', value, 'expires', now + ttl)
redis.call('PEXPIRE', at('info', id), ttl / 1000)
redis.call('HSET', base .. ':bytes', id, bytes)
redis.call('PEXPIRE', base .. ':bytes', ttl / 1000)
change(id, ttl / 1000)
drop_unused(most)
local total = 0
for _, each in ipairs(redis.call('HVALS', base .. ':bytes')) do total = total + tonumber(each) end
while total > most_bytes and redis.call('ZCARD', base .. ':used') > 1 do
  local unused = redis.call('ZRANGE', base .. ':used', 0, 0)[1]
  total = total - tonumber(redis.call('HGET', base .. ':bytes', unused) or '0')
  forget(unused)
end
"""
_READ = """
if not is_live(id) then return nil end
use(id)
if redis.call('HSTRLEN', at('info', id), 'value') > tonumber(ARGV[3]) then return '' end
return redis.call('HGET', at('info', id), 'value') or ''
"""
_PUT_SCRIPT, _READ_SCRIPT, _DELETE_SCRIPT = (Script(PRELUDE + body) for body in (_PUT, _READ, DELETE))


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    turns: tuple[Turn, ...]
    document: bytes
    input_items: bytes


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Stored)


class RedisResponseStore:
    """Responses of all replicas."""

    def __init__(
        self,
        connection: RedisConnection,
        config: ChatHistoryConfig,
        encryption: Encryption,
        *,
        tenant_bytes: int = TENANT_BYTES,
        wall_clock: Callable[[], datetime] | None = None,
    ) -> None:
        """Args:
        tenant_bytes: documents and inputs of one tenant's responses in sum.
        wall_clock: aware UTC time, for the time to live; None is Redis' own.
        """
        self._connection = connection
        self._config = config
        self._encryption = encryption
        self._tenant_bytes = tenant_bytes
        self._wall_clock = wall_clock

    async def read(self, tenant: Tenant, response_id: str) -> StoredResponse | None:
        found = await self._connection.evaluate(
            _READ_SCRIPT, [self._base(tenant)], [key_part(response_id), self._now, MAX_RESPONSE_BYTES]
        )
        if found is None:
            return None
        try:
            stored = _DECODER.decode(self._encryption.decrypt(found, _place(tenant, response_id)))
        except (UnreadableValue, msgspec.DecodeError):
            raise SessionUnreadable("response") from None
        return StoredResponse(
            id=response_id, turns=stored.turns, document=stored.document, input_items=stored.input_items
        )

    async def put(self, tenant: Tenant, response: StoredResponse) -> None:
        turns = newest_turns(response.turns, self._config)
        value = _ENCODER.encode(_Stored(turns, response.document, response.input_items))
        shown = len(response.document) + len(response.input_items)
        limits = (int(self._config.ttl_seconds * 1e6), self._config.max_sessions, self._tenant_bytes)
        stored = self._encryption.encrypt(value, _place(tenant, response.id))
        await self._connection.evaluate(
            _PUT_SCRIPT, [self._base(tenant)], [key_part(response.id), self._now, *limits, shown, stored]
        )

    async def delete(self, tenant: Tenant, response_id: str) -> bool:
        deleted: int = await self._connection.evaluate(
            _DELETE_SCRIPT, [self._base(tenant)], [key_part(response_id), self._now]
        )
        return deleted > 0

    def check(self) -> None:
        if self._connection.fault is not None:
            raise self._connection.unavailable()

    def _base(self, tenant: Tenant) -> str:
        return self._connection.key("responses", key_part(str(tenant)))

    @property
    def _now(self) -> int:
        return 0 if self._wall_clock is None else microseconds(self._wall_clock())


def _place(tenant: Tenant, response_id: str) -> bytes:
    return digest("response", str(tenant), response_id)
