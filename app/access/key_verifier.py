"""Verifies API keys against the database and the configuration."""

import hmac
from dataclasses import dataclass
from datetime import UTC, datetime

from app.access.key_format import CONFIGURED_ID, digest_of, id_of
from app.access.keys import KeyStore, KeyWithRole
from app.access.limits import LimitSettings, resolve
from app.access.roles import ADMIN, Role, RoleStore
from app.errors import KeyNotFound
from app.types import Limits, Principal, Rights, Tenant

NEVER = datetime.max.replace(tzinfo=UTC)

_NO_DIGEST = bytes(32)
_CONFIGURED_ROLE = Role(
    name=ADMIN, limits=LimitSettings(monthly_tokens=0), rights=Rights(load_models=True, manage_keys=True)
)
"""The role of the configured key while the database is away."""


@dataclass(frozen=True, slots=True)
class KeyClaim:
    """A presented key that has the form of one, not verified yet."""

    digest: bytes
    key_id: str
    configured: bool
    """Whether it is the configured key."""


@dataclass(frozen=True, slots=True)
class VerifiedKey:
    """The owner of a valid key."""

    principal: Principal
    expires: datetime = NEVER


class KeyVerifier:
    """Finds the owner of a key in the database, each time anew; `Authenticator` caches the result."""

    def __init__(self, keys: KeyStore, roles: RoleStore, defaults: Limits, *, configured_key: str | None) -> None:
        """Args:
        defaults: limits where neither key nor role says anything.
        configured_key: has the role admin, and no row in the database.  Its id is `CONFIGURED_ID` even where it has the
            form of our own keys: the id in it may be that of a row, which is rotated, limited and revoked by itself.
        """
        self._keys = keys
        self._roles = roles
        self._defaults = defaults
        self._configured = digest_of(configured_key.encode()) if configured_key else None

    def claim(self, presented: bytes) -> KeyClaim | None:
        """Return what a key claims to be, None if it cannot be one."""
        digest = digest_of(presented)
        if self._configured is not None and hmac.compare_digest(digest, self._configured):
            return KeyClaim(digest, CONFIGURED_ID, configured=True)
        key_id = id_of(presented.decode("ascii", "replace"))
        return None if key_id is None else KeyClaim(digest, key_id, configured=False)

    async def verify(self, claim: KeyClaim) -> VerifiedKey | None:
        """Raises: StoreUnavailable: the database does not answer."""
        if claim.configured:
            return self._admin(await self._roles.read(ADMIN))
        found = await self._keys.find(claim.key_id)
        expires = _valid_until(found, claim.digest, datetime.now(UTC))
        return None if found is None or expires is None else VerifiedKey(self._principal(found), expires)

    async def principal_of(self, key_id: str) -> Principal | None:
        """Return the owner of a key that was presented earlier; None if it is revoked by now, or past its time.

        Raises: StoreUnavailable: the database does not answer.
        """
        if key_id == CONFIGURED_ID:
            return None if self._configured is None else self._admin(await self._roles.read(ADMIN)).principal
        found = await self._keys.find(key_id)
        valid = found is not None and found.record.valid_at(datetime.now(UTC))
        return self._principal(found) if found is not None and valid else None

    def _principal(self, found: KeyWithRole) -> Principal:
        key, role = found.record, found.role
        limits = resolve(self._defaults, key.limits, role.limits)
        tenant = Tenant.owner(key.owner) if key.owner else Tenant.key(key.id)
        return Principal(key.id, tenant, role.name, limits, role.rights)

    def vouch(self, claim: KeyClaim) -> VerifiedKey | None:
        """Verify a key without the database: only the configured one can be."""
        return self._admin(_CONFIGURED_ROLE) if claim.configured else None

    def _admin(self, role: Role) -> VerifiedKey:
        limits = resolve(self._defaults, role.limits)
        return VerifiedKey(Principal(CONFIGURED_ID, Tenant.configured(), ADMIN, limits, role.rights))

    async def limits_of(self, key_id: str) -> Limits:
        """Return the limits of any key, valid or not.

        Raises: KeyNotFound: there is no such key.  StoreUnavailable: the database does not answer.
        """
        found = await self._keys.find(key_id)
        if found is not None:
            return resolve(self._defaults, found.record.limits, found.role.limits)
        if self._configured is None or key_id != CONFIGURED_ID:
            raise KeyNotFound("There is no key of this id.")
        return resolve(self._defaults, (await self._roles.read(ADMIN)).limits)


def _valid_until(found: KeyWithRole | None, digest: bytes, now: datetime) -> datetime | None:
    """Return until when a secret is valid, None if it is not.

    A key that does not exist is compared too, so that it takes the same time.
    """
    current = hmac.compare_digest(digest, found.digest if found else _NO_DIGEST)
    previous = hmac.compare_digest(digest, (found.previous_digest if found else None) or _NO_DIGEST)
    if found is None or not found.record.valid_at(now):
        return None
    expires = found.record.expires or NEVER
    if current:
        return expires
    overlap = found.record.previous_expires
    return min(overlap, expires) if previous and overlap is not None and now < overlap else None
