"""Decide whose API key this is, quickly and also while the database is away.

A key's owner is remembered for a few seconds by the digest of the whole key, and while the key is in use the database
is asked behind its requests.  So a revocation holds everywhere within `FRESH_SECONDS` as long as the database answers,
and an outage shorter than `STALE_SECONDS` locks out nobody who was here before, and makes no key wait that is in use.
Knows no HTTP.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from cachetools import LRUCache

from app.access.key_format import digest_of, id_of
from app.access.keys import Found, KeyStore
from app.access.limits import LimitSettings, resolve
from app.access.roles import ADMIN, RoleStore
from app.errors import KeyNotFound, StoreUnavailable
from app.types import Limits, Principal, Rights

RENEW_SECONDS = 1.5
"""From this age on what is remembered is asked anew, behind the request; an outage is then noticed in time."""
FRESH_SECONDS = 4.0
"""From this age on a request waits for what the database says: a second less than a revocation may take."""
STALE_SECONDS = 60.0
"""So long is the last answer good while the database is down."""
KNOWN_WAIT_SECONDS = 0.5
"""A database that takes longer than this is away for the keys that are known."""
PROBE_SECONDS = 1.0
"""So often is a database that was away tried again."""
MAX_REMEMBERED = 10_000

_NOBODY = bytes(32)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Remembered:
    principal: Principal
    asked: float
    expires: datetime | None


class KeyRing:
    """Tells whose a key is; lives as long as the application."""

    def __init__(
        self,
        keys: KeyStore,
        roles: RoleStore,
        defaults: Limits,
        *,
        configured_key: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        defaults: limits where neither key nor role says anything.
        configured_key: has the role admin, and no row in the database.  One of our own form is known by the id in it,
            any other as "admin".
        clock: seconds that never go back.
        """
        self.used: dict[str, datetime] = {}
        """When each key was last used, until somebody takes it to the database."""
        self._keys = keys
        self._roles = roles
        self._defaults = defaults
        self._clock = clock
        self._known: LRUCache[bytes, _Remembered] = LRUCache(MAX_REMEMBERED)
        self._asking: dict[bytes, asyncio.Task[_Remembered | None]] = {}
        self._running: set[asyncio.Task[_Remembered | None]] = set()
        """Those in `_asking`, and those whose answer nobody wants any more."""
        self._closed = False
        self._away = False
        self._probing: asyncio.Task[None] | None = None
        self._configured = digest_of(configured_key.encode()) if configured_key else None
        self._configured_id = (id_of(configured_key) or ADMIN) if configured_key else ADMIN

    async def authenticate(self, presented: bytes) -> Principal | None:
        """Return the owner of a key, or None if no such key is valid.

        Raises: StoreUnavailable: the database is down, and the key was not seen lately.
        """
        digest = digest_of(presented)
        configured = self._configured is not None and hmac.compare_digest(digest, self._configured)
        key_id = self._configured_id if configured else id_of(presented.decode("ascii", "replace"))
        if key_id is None:
            return None
        known = self._known.get(digest)
        age = self._clock() - known.asked if known else STALE_SECONDS + 1
        if age > STALE_SECONDS:
            known = await self._look_up(key_id, digest, configured=configured)
        elif age > RENEW_SECONDS and not self._away:
            asking = self._ask(key_id, digest, configured=configured)
            if age > FRESH_SECONDS:
                known = await self._news(asking, known)
        now = datetime.now(UTC)
        if known is None or (known.expires is not None and known.expires <= now):
            return None
        self.used[key_id] = now
        return known.principal

    async def _look_up(self, key_id: str, digest: bytes, *, configured: bool) -> _Remembered | None:
        try:
            return await asyncio.shield(self._ask(key_id, digest, configured=configured))
        except StoreUnavailable:
            if not configured:
                raise
            # The configuration vouches for this key, database or not.
            unlimited = resolve(self._defaults, LimitSettings(monthly_tokens=0))
            return self._as_admin(Rights(load_models=True, manage_keys=True), unlimited, self._clock())

    async def _news(self, asking: "asyncio.Task[_Remembered | None]", known: _Remembered | None) -> _Remembered | None:
        """Return what the database says of a known key, or after a moment what was known."""
        await asyncio.wait({asking}, timeout=KNOWN_WAIT_SECONDS)
        if not asking.done():
            self._went_away()
            return known
        return known if isinstance(asking.exception(), StoreUnavailable) else asking.result()

    def _ask(self, key_id: str, digest: bytes, *, configured: bool) -> "asyncio.Task[_Remembered | None]":
        """Ask the database, once for all requests of a key that are there at the time."""
        if digest not in self._asking:
            asked = self._clock()
            asking = self._admin(asked) if configured else self._stored(key_id, digest, asked)
            task = self._asking[digest] = asyncio.create_task(asking)
            self._running.add(task)
            task.add_done_callback(lambda task: self._answered(digest, task))
        return self._asking[digest]

    def _answered(self, digest: bytes, task: "asyncio.Task[_Remembered | None]") -> None:
        self._running.discard(task)
        wanted = self._asking.get(digest) is task
        if wanted:
            del self._asking[digest]
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, StoreUnavailable):
            self._went_away()
        elif error is not None:
            log.error("an API key could not be looked up", exc_info=error)
        else:
            self._away = False
            found = task.result()
            if wanted and found is not None:
                self._known[digest] = found
            elif wanted:
                self._known.pop(digest, None)

    def _went_away(self) -> None:
        """Wait for the database no more where something is known, until it answers again."""
        self._away = True
        if not self._closed and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        while self._away:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await self._roles.read(ADMIN)
            except StoreUnavailable:
                continue
            except Exception:
                log.exception("the database answers strangely")
            # It answers: what is wrong beyond that is told to those who ask.
            self._away = False

    async def close(self) -> None:
        """Ask no more."""
        self._closed = True
        tasks = [*self._running, *([self._probing] if self._probing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _admin(self, asked: float) -> _Remembered:
        role = await self._roles.read(ADMIN)
        return self._as_admin(role.rights, resolve(self._defaults, role.limits), asked)

    def _as_admin(self, rights: Rights, limits: Limits, asked: float) -> _Remembered:
        principal = Principal(self._configured_id, self._configured_id, role=ADMIN, limits=limits, rights=rights)
        return _Remembered(principal, asked, None)

    async def _stored(self, key_id: str, digest: bytes, asked: float) -> _Remembered | None:
        """Compare with what is stored; an id that is not there is compared too, so that it takes the same time."""
        found = await self._keys.find(key_id)
        now = datetime.now(UTC)
        right = hmac.compare_digest(digest, found.digest if found else _NOBODY)
        before = hmac.compare_digest(digest, (found.previous_digest if found else None) or _NOBODY)
        if found is None or not found.record.good_at(now):
            return None
        if right:
            return _Remembered(_principal(found, self._defaults), asked, found.record.expires)
        overlap = found.record.previous_expires
        if before and overlap is not None and now < overlap:
            ends = min(overlap, found.record.expires or overlap)
            return _Remembered(_principal(found, self._defaults), asked, ends)
        return None

    async def limits_of(self, key_id: str) -> Limits:
        """Return the limits of any key, good or not.

        Raises: KeyNotFound: there is no such key.  StoreUnavailable: the database does not answer.
        """
        found = await self._keys.find(key_id)
        if found is not None:
            return resolve(self._defaults, found.record.limits, found.role.limits)
        if self._configured is None or key_id != self._configured_id:
            raise KeyNotFound("There is no key of this id.")
        return resolve(self._defaults, (await self._roles.read(ADMIN)).limits)

    def forget(self, key_id: str) -> None:
        """Ask the database again at the key's next use: something about it has changed."""
        for digest in [digest for digest, known in self._known.items() if known.principal.key_id == key_id]:
            del self._known[digest]
        self._asking.clear()  # what is on its way may be from before the change

    def forget_all(self) -> None:
        """The same for every key: a role has changed."""
        self._known = LRUCache(MAX_REMEMBERED)
        self._asking.clear()


def _principal(found: Found, defaults: Limits) -> Principal:
    key = found.record
    return Principal(
        key_id=key.id,
        tenant=key.owner or key.id,
        role=found.role.name,
        limits=resolve(defaults, key.limits, found.role.limits),
        rights=found.role.rights,
    )
