"""The counters of tokens, and what is reserved of them: plain transactions, the same on SQLite and Postgres.

A grant is one conditional UPDATE, so however many ask at once, no more is granted than there is.  A settlement has
the id of its reservation, and doing it again changes nothing: after a lost connection nobody knows whether a commit
arrived.  Knows no task and no clock.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert_postgres
from sqlalchemy.dialects.sqlite import insert as upsert_sqlite
from sqlalchemy.dialects.sqlite.dml import Insert

from app.access import tables
from app.access.database import Database

_counters, _reservations = tables.usage_counters, tables.reservations


class Month(NamedTuple):
    """A key's counter: decided when a request is let in, and kept until it is settled."""

    key_id: str
    month: str
    """UTC, as 2026-11."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Take tokens out of what the month has left."""

    id: str
    counter: Month
    tokens: int
    limit: int
    expires: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Put the tokens that were really used in the place of a reservation."""

    id: str
    counter: Month
    tokens: int


@dataclass(frozen=True, slots=True)
class Standing:
    """How a counter stands; `granted` tells what came of a reservation."""

    used: int = 0
    reserved: int = 0
    granted: bool = True


_this_counter = (_counters.c.key_id == bindparam("key")) & (_counters.c.month == bindparam("in_month"))
_GRANT = (
    update(_counters)
    .where(_this_counter, _counters.c.used + _counters.c.reserved + bindparam("more") <= bindparam("at_most"))
    .values(reserved=_counters.c.reserved + bindparam("more"))
)
_ADD = (
    update(_counters)
    .where(_this_counter)
    .values(used=_counters.c.used + bindparam("more"), reserved=_counters.c.reserved - bindparam("released"))
)
_STANDING = select(_counters.c.used, _counters.c.reserved).where(_this_counter)
_RESERVATION = insert(_reservations)
_RELEASE = delete(_reservations).where(_reservations.c.id == bindparam("which")).returning(_reservations.c.tokens)
_RENEW = update(_reservations).where(_reservations.c.id == bindparam("which")).values(expires=bindparam("until"))


def reserve(connection: Connection, order: Reserve) -> Standing:
    """Grant what the month has left or nothing; the standing says which."""
    of = {"key": order.counter.key_id, "in_month": order.counter.month}
    grant = {**of, "more": order.tokens, "at_most": order.limit}
    if connection.execute(_GRANT, grant).rowcount == 0:
        make_counter(connection, order.counter)
        if connection.execute(_GRANT, grant).rowcount == 0:
            row = connection.execute(_STANDING, of).one()
            return Standing(row.used, row.reserved, granted=False)
    row_values = {"id": order.id, "key_id": order.counter.key_id, "month": order.counter.month}
    connection.execute(_RESERVATION, {**row_values, "tokens": order.tokens, "expires": order.expires})
    return Standing()


def settle(connection: Connection, order: Settle, *, again: bool = False) -> Standing:
    """Args: again: it was tried before, and may have been done: then the reservation is gone."""
    row: Row[tuple[int]] | None = connection.execute(_RELEASE, {"which": order.id}).first()
    if row is not None or not again:
        # A reservation that its lease has released already gives nothing back, but what was used counts.
        add(connection, order.counter, order.tokens, released=row.tokens if row else 0)
    return Standing()


def add(connection: Connection, counter: Month, tokens: int, *, released: int = 0) -> None:
    """Count tokens as used."""
    values = {"key": counter.key_id, "in_month": counter.month, "more": tokens, "released": released}
    if connection.execute(_ADD, values).rowcount == 0:
        make_counter(connection, counter)
        connection.execute(_ADD, values)


def renew(connection: Connection, ids: list[str], until: datetime) -> None:
    """Say that these reservations are still needed."""
    if ids:
        connection.execute(_RENEW, [{"which": each, "until": until} for each in sorted(ids)])


def release_expired(connection: Connection, now: datetime) -> int:
    """Give back what processes had reserved that renew it no more; return how many reservations that were."""
    columns = (_reservations.c.key_id, _reservations.c.month, _reservations.c.tokens)
    rows = connection.execute(delete(_reservations).where(_reservations.c.expires < now).returning(*columns)).all()
    for key_id, month, tokens in sorted(tuple(row) for row in rows):
        add(connection, Month(key_id, month), 0, released=tokens)
    return len(rows)


def make_counter(connection: Connection, counter: Month) -> None:
    """Make the row of a month if it is not there."""
    kind = upsert_sqlite if connection.dialect.name == "sqlite" else upsert_postgres
    values = {"key_id": counter.key_id, "month": counter.month, "used": 0, "reserved": 0}
    statement: Insert = kind(_counters).values(values)  # type: ignore[assignment]  # both say on_conflict_do_nothing
    connection.execute(statement.on_conflict_do_nothing())


async def standing(database: Database, counter: Month) -> Standing:
    """Return how a counter stands; one that was never used stands at nothing."""
    async with database.read() as connection:
        of = {"key": counter.key_id, "in_month": counter.month}
        row = (await connection.execute(_STANDING, of)).first()
    return Standing(row.used, row.reserved) if row else Standing()
