"""Roles: what the keys that have one may do, and how much of it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, exists, insert, null, select, update
from sqlalchemy.exc import IntegrityError

from app.access import tables
from app.access.database import Database
from app.access.limits import LimitSettings
from app.errors import Conflict, Forbidden, RoleNotFound
from app.types import Rights

ADMIN = "admin"
BUILT_IN = (ADMIN, "standard", "free")
"""Created by the first migration; they can be changed but not deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A role as it is stored."""

    name: str
    limits: LimitSettings
    rights: Rights

    @classmethod
    def of(cls, row: Mapping[Any, Any], prefix: str = "") -> "Role":
        """Take the columns of these names from a row."""
        models = row[prefix + "models"]
        names = ("load_models", "manage_keys", "system_messages", "raw_logprobs", "control_tokens")
        rights = Rights(
            models=None if models is None else tuple(models), **{name: row[prefix + name] for name in names}
        )
        return cls(name=row[prefix + "name"], limits=LimitSettings.of(row, prefix), rights=rights)


class RoleStore:
    """The roles in the database; an admin always stays one who may manage keys."""

    def __init__(self, database: Database, on_change: Callable[[], None] = lambda: None) -> None:
        """Args: on_change: is called after this process has changed a role."""
        self._db = database
        self._on_change = on_change

    async def list(self) -> list[Role]:
        async with self._db.read() as connection:
            rows = (await connection.execute(select(tables.roles).order_by(tables.roles.c.name))).mappings()
            return [Role.of(row) for row in rows]

    async def read(self, name: str) -> Role:
        """Raises: RoleNotFound: there is no such role."""
        query = select(tables.roles).where(tables.roles.c.name == name)
        row = await self._db.read_in_transaction(lambda connection: connection.execute(query).mappings().first())
        if row is None:
            raise RoleNotFound("There is no role of this name.")
        return Role.of(row)

    async def put(self, role: Role) -> None:
        """Put a role in the place of the one of its name, or make it.

        Raises: Forbidden: nobody could undo that change.  Conflict: somebody else created it at the same moment.
        """
        if role.name == ADMIN and not role.rights.manage_keys:
            raise Forbidden("The role admin must be able to manage keys, or nobody could.")
        try:
            await self._put(role)
        except IntegrityError:
            raise Conflict("Somebody else made this role at the same moment; try again.") from None
        self._on_change()

    async def _put(self, role: Role) -> None:
        async with self._db.begin() as connection:
            change = update(tables.roles).where(tables.roles.c.name == role.name).values(_values(role))
            if (await connection.execute(change)).rowcount == 0:
                await connection.execute(insert(tables.roles).values(_values(role)))

    async def delete(self, name: str) -> None:
        """Raises: RoleNotFound: there is none.  Conflict: it is built in, or keys have it."""
        if name in BUILT_IN:
            raise Conflict("This role is built in; it can be changed but not deleted.")
        role = select(tables.roles.c.name).where(tables.roles.c.name == name).with_for_update()
        async with self._db.begin() as connection:
            # Locked first: whoever gives it to a key at the same moment has done so, or finds it gone.
            await connection.execute(role)
            used = exists().where(tables.api_keys.c.role == name)
            if await connection.scalar(select(used)):
                raise Conflict("Keys have this role; give them another one first.")
            if (await connection.execute(delete(tables.roles).where(tables.roles.c.name == name))).rowcount == 0:
                raise RoleNotFound("There is no role of this name.")
        self._on_change()


def _values(role: Role) -> dict[str, Any]:
    models = null() if role.rights.models is None else list(role.rights.models)
    return {"name": role.name, **asdict(role.limits), **asdict(role.rights), "models": models}
