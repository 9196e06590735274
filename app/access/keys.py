"""The API keys in the database: created, shown without their secret, changed, rotated, revoked.

Of a secret only the digest and the last four characters are stored; whoever creates a key sees it once.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select, bindparam, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from app.access import tables
from app.access.database import Database
from app.access.key_format import digest_of, id_of, new_key
from app.access.limits import LIMIT_NAMES, NOTHING_SAID, LimitSettings
from app.access.roles import Role
from app.errors import KeyNotFound, RoleNotFound

USED_AT_ONCE = 1000
"""Keys whose last use is written in one transaction."""

_keys = tables.api_keys
_USED = update(_keys).where(_keys.c.id == bindparam("key")).values(last_used=bindparam("moment"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A stored key without its secret, for display."""

    id: str
    last_four: str
    role: str
    owner: str | None
    limits: LimitSettings
    """The key's own limits; its role has the others."""
    created: datetime
    expires: datetime | None
    revoked: datetime | None
    last_used: datetime | None
    """Exact to half a minute."""
    previous_expires: datetime | None
    """Until when the secret before the last rotation is good too."""

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> "KeyRecord":
        names = "id last_four role owner created expires revoked last_used previous_expires"
        return cls(limits=LimitSettings.of(row), **{name: row[name] for name in names.split()})

    def valid_at(self, moment: datetime) -> bool:
        """Whether the key is neither revoked nor past its time."""
        return self.revoked is None and (self.expires is None or moment < self.expires)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyWithRole:
    """A key as authentication needs it."""

    record: KeyRecord
    role: Role
    digest: bytes
    previous_digest: bytes | None


class KeyStore:
    """The keys in the database."""

    def __init__(self, database: Database, on_change: Callable[[str], None] = lambda key_id: None) -> None:
        """Args: on_change: is called with the id of a key that this process has changed."""
        self._db = database
        self._on_change = on_change

    async def create(
        self,
        *,
        role: str,
        owner: str | None = None,
        limits: LimitSettings = NOTHING_SAID,
        expires: datetime | None = None,
        key: str | None = None,
    ) -> tuple[KeyRecord, str]:
        """Create a key and return it with its secret, which nobody will see again.

        Args: key: one that exists already, such as the first start's; it stays as it is if the database knows it.
        Raises: RoleNotFound: there is no such role.  ValueError: `key` has another form than ours, and so no id.
        """
        known, key = key is not None, key or new_key()
        if (key_id := id_of(key)) is None:
            raise ValueError("only a key of our own form has a row")
        values: dict[str, Any] = {"id": key_id, "digest": digest_of(key.encode()), "last_four": key[-4:], "role": role}
        values |= {"owner": owner, **asdict(limits), "created": _now(), "expires": expires}
        try:
            async with self._db.begin() as connection:
                await _require_role(connection, role)
                await connection.execute(insert(_keys).values(values))
        except IntegrityError:
            if not known:
                raise
        return await self.read(key_id), key

    async def read(self, key_id: str) -> KeyRecord:
        """Raises: KeyNotFound: there is no such key."""
        async with self._db.read() as connection:
            return await _read(connection, key_id)

    async def list(
        self, *, limit: int, after: str | None = None, owner: str | None = None, role: str | None = None
    ) -> Sequence[KeyRecord]:
        """Return the keys in the order of their creation.

        Args: after: begin behind the key of this id.
        Raises: KeyNotFound: there is no key of that id.
        """
        query: Select[Any] = select(_keys).order_by(_keys.c.created, _keys.c.id).limit(limit)
        if owner is not None:
            query = query.where(_keys.c.owner == owner)
        if role is not None:
            query = query.where(_keys.c.role == role)
        async with self._db.read() as connection:
            if after is not None:
                last = await _read(connection, after)
                query = query.where(tuple_(_keys.c.created, _keys.c.id) > tuple_(last.created, last.id))
            return [KeyRecord.of(row) for row in (await connection.execute(query)).mappings()]

    async def change(self, key_id: str, values: Mapping[str, Any]) -> KeyRecord:
        """Set role, owner, expires or limits.

        Args: values: by the names of the columns.
        Raises: KeyNotFound, RoleNotFound: there is no such key or role.
        """
        unknown = set(values) - {"role", "owner", "expires", *LIMIT_NAMES}
        if unknown:
            raise ValueError(f"cannot be changed: {unknown}")
        async with self._changing(key_id) as connection:
            if "role" in values:
                await _require_role(connection, values["role"])
            if values:
                await connection.execute(update(_keys).where(_keys.c.id == key_id).values(**values))
            return await _read(connection, key_id)

    async def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good; one that is revoked already stays as it is.

        Raises: KeyNotFound: there is no such key.
        """
        async with self._changing(key_id) as connection:
            alive = (_keys.c.id == key_id) & _keys.c.revoked.is_(None)
            await connection.execute(update(_keys).where(alive).values(revoked=_now(), previous_digest=None))
            return await _read(connection, key_id)

    async def rotate(self, key_id: str, overlap: timedelta) -> tuple[KeyRecord, str]:
        """Give a key a new secret; the old one is good for a while yet.

        Raises: KeyNotFound: there is no such key, or it is revoked.
        """
        key = new_key(key_id)
        values = {"digest": digest_of(key.encode()), "last_four": key[-4:]}
        previous = {"previous_digest": _keys.c.digest, "previous_expires": _now() + overlap}
        async with self._changing(key_id) as connection:
            alive = (_keys.c.id == key_id) & _keys.c.revoked.is_(None)
            if (await connection.execute(update(_keys).where(alive).values(**values, **previous))).rowcount == 0:
                raise KeyNotFound("There is no key of this id, or it is revoked.")
            return await _read(connection, key_id), key

    @asynccontextmanager
    async def _changing(self, key_id: str) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._db.begin() as connection:
                yield connection
        finally:
            # Also after a failure: nobody knows whether the commit arrived.
            self._on_change(key_id)

    async def find(self, key_id: str) -> KeyWithRole | None:
        """Return all that authentication needs of a key.

        Raises: StoreUnavailable: the database does not answer.
        """
        columns = [*_keys.c, *(column.label(f"role_{column.name}") for column in tables.roles.c)]
        query = select(*columns).join(tables.roles, tables.roles.c.name == _keys.c.role).where(_keys.c.id == key_id)
        row = await self._db.read_in_transaction(lambda connection: connection.execute(query).mappings().first())
        if row is None:
            return None
        return KeyWithRole(
            record=KeyRecord.of(row),
            role=Role.of(row, "role_"),
            digest=row["digest"],
            previous_digest=row["previous_digest"],
        )

    async def used(self, moments: Mapping[str, datetime]) -> None:
        """Note when these keys were last used, in one statement for many of them."""
        # In one order everywhere, so that two replicas never wait for each other's rows.
        rows = [{"key": key_id, "moment": moment} for key_id, moment in sorted(moments.items())]
        for first in range(0, len(rows), USED_AT_ONCE):
            async with self._db.begin() as connection:
                await connection.execute(_USED, rows[first : first + USED_AT_ONCE])


async def _read(connection: AsyncConnection, key_id: str) -> KeyRecord:
    row = (await connection.execute(select(_keys).where(_keys.c.id == key_id))).mappings().first()
    if row is None:
        raise KeyNotFound("There is no key of this id.")
    return KeyRecord.of(row)


async def _require_role(connection: AsyncConnection, name: str) -> None:
    # Locked until the key has it: a role that is being deleted waits, and then finds the key.
    role = select(tables.roles.c.name).where(tables.roles.c.name == name).with_for_update(read=True)
    if await connection.scalar(role) is None:
        raise RoleNotFound("There is no role of this name.")


def _now() -> datetime:
    return datetime.now(UTC)
