"""The response cache's level that replicas share, in Redis; one of them generates what many ask for.

Implements the `ResponseStore` and the `Claims` of `engine.persistent_cache`.  A claim is leased and renewed while the
response is generated, so that of a dead replica ends soon; where Redis is away everyone generates for itself.
"""

import asyncio
from contextlib import suppress
from typing import Any
from uuid import uuid4

from app.engine.persistent_cache import MAX_RESPONSE_BYTES, Claim
from app.errors import StoreUnavailable
from app.stores.encryption import Encryption, UnreadableValue
from app.stores.redis_connection import RedisConnection, Script
from app.stores.tenant_scripts import digest

LEASE_SECONDS = 3.0
NOT_STORABLE_SECONDS = 5.0
"""How long requests do not wait for one another after a response that could not be stored."""
MAX_STORED_BYTES = MAX_RESPONSE_BYTES + 1024
"""Longer values are none of ours, and are not read."""

_NOT_STORABLE = "not storable"
_GET = Script("""
if redis.call('STRLEN', KEYS[1]) > tonumber(ARGV[1]) then return '' end
return redis.call('GET', KEYS[1])
""")
_CLAIM = Script("""
local claim = KEYS[1] .. ':claim'
if ARGV[3] == '0' and redis.call('EXISTS', KEYS[1]) == 1 then return 'taken' end
if redis.call('SET', claim, ARGV[1], 'NX', 'PX', ARGV[2]) then return 'granted' end
return redis.call('GET', claim) == ARGV[4] and 'none' or 'taken'
""")
_RENEW = Script("""
local claim = KEYS[1] .. ':claim'
if redis.call('GET', claim) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', claim, ARGV[2])
""")
_PUT = Script("""
local claim = KEYS[1] .. ':claim'
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
if redis.call('GET', claim) == ARGV[1] then redis.call('UNLINK', claim) end
""")
_GIVE_UP = Script("""
local claim = KEYS[1] .. ':claim'
if redis.call('GET', claim) ~= ARGV[1] then return end
if ARGV[2] == '' then redis.call('UNLINK', claim) else redis.call('SET', claim, ARGV[2], 'PX', ARGV[3]) end
""")


class RedisResponseCache:
    """Responses by the digest of everything that could change them, encrypted, for a time."""

    def __init__(
        self,
        connection: RedisConnection,
        ttl_seconds: float,
        encryption: Encryption,
        *,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Args: lease_seconds: after which another may generate what a dead replica began."""
        self._connection = connection
        self._ttl_ms = int(ttl_seconds * 1000)
        self._encryption = encryption
        self._lease_seconds = lease_seconds
        self._claims: dict[bytes, tuple[str, asyncio.Task[None]]] = {}
        """Key -> token and renewal of what this process generates for all."""
        self._writing: set[asyncio.Task[None]] = set()

    async def get(self, key: bytes) -> bytes | None:
        """Return what is stored; None also where Redis does not answer, and no bytes for what cannot be read."""
        try:
            stored = await self._connection.evaluate(_GET, [self._name(key)], [MAX_STORED_BYTES])
        except StoreUnavailable:
            return None
        if stored is None:
            return None
        try:
            return self._encryption.decrypt(stored, _place(key))
        except UnreadableValue:
            return b""

    async def claim(self, key: bytes, *, replacing: bool = False) -> Claim:
        token = uuid4().hex
        try:
            arguments = (token, self._lease_ms, int(replacing), _NOT_STORABLE)
            claimed = await self._connection.evaluate(_CLAIM, [self._name(key)], arguments)
        except StoreUnavailable:
            return Claim.NONE
        if claimed != b"granted":
            return Claim.NONE if claimed == b"none" else Claim.TAKEN
        self._release(key)  # of an earlier claim, whose lease was lost
        self._claims[key] = token, asyncio.create_task(self._renew(key, token))
        return Claim.GRANTED

    def put(self, key: bytes, response: bytes) -> None:
        """Store a response, and end the claim to it, without waiting."""
        stored = self._encryption.encrypt(response, _place(key))
        self._write(_PUT, key, [self._release(key), stored, self._ttl_ms])

    def give_up(self, key: bytes, *, shared: bool) -> None:
        if token := self._release(key):
            mark = "" if shared else _NOT_STORABLE
            self._write(_GIVE_UP, key, [token, mark, int(NOT_STORABLE_SECONDS * 1000)])

    async def close(self) -> None:
        """End all claims, and wait for what is being written."""
        for key in list(self._claims):
            self.give_up(key, shared=True)
        await asyncio.gather(*self._writing)

    async def _renew(self, key: bytes, token: str) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            with suppress(StoreUnavailable):
                await self._connection.evaluate(_RENEW, [self._name(key)], [token, self._lease_ms])

    def _release(self, key: bytes) -> str:
        """Stop renewing a claim.  Returns: its token; nothing where none is held."""
        token, renewing = self._claims.pop(key, ("", None))
        if renewing is not None:
            renewing.cancel()
        return token

    def _write(self, script: Script, key: bytes, arguments: list[Any]) -> None:
        async def write() -> None:
            with suppress(StoreUnavailable):  # it is only a cache
                await self._connection.evaluate(script, [self._name(key)], arguments)

        task = asyncio.create_task(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    @property
    def _lease_ms(self) -> int:
        return int(self._lease_seconds * 1000)

    def _name(self, key: bytes) -> str:
        return self._connection.key("cache", key.hex())


def _place(key: bytes) -> bytes:
    return digest("cache", key.hex())
