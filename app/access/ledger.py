"""The counters of tokens, and what is reserved of them: plain transactions, the same on SQLite and Postgres.

A grant is one conditional UPDATE, so however many requests compete, no more is granted than there is.  A commit has
the id of its reservation, and doing it again changes nothing: after a lost connection nobody knows whether the
transaction arrived.  Other writes get such an id by `begin_attempt`.  Pure functions of a connection; `quotas.py` and
`usage_log.py` call them.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Table, bindparam, delete, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert_postgres
from sqlalchemy.dialects.sqlite import insert as upsert_sqlite
from sqlalchemy.dialects.sqlite.dml import Insert

from app.access import tables
from app.access.database import Database

REMEMBERED = timedelta(days=1)
"""How long a row says that its reservation was released by its lease, or what became of an attempt: longer than any
process tries again what it could not write."""

_counters, _reservations = tables.usage_counters, tables.reservations
_APPLIED, _VOID = "applied", "void"
"""In the place of a key's id in the row of an attempt."""


class Month(NamedTuple):
    """A key's counter: chosen when a request is let in, and the same until its tokens are committed."""

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
class Commit:
    """Put the tokens that were really used in the place of a reservation."""

    id: str
    counter: Month
    tokens: int


@dataclass(frozen=True, slots=True)
class Balance:
    """A counter's figures; `granted` says what came of a reservation."""

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
    .returning(_counters.c.used)
)
_BALANCE = select(_counters.c.used, _counters.c.reserved).where(_this_counter)
_RESERVATION = insert(_reservations)
_RELEASE = delete(_reservations).where(_reservations.c.id == bindparam("which")).returning(_reservations.c.tokens)
_RENEW = update(_reservations).where(_reservations.c.id == bindparam("which")).values(expires=bindparam("until"))


def reserve(connection: Connection, order: Reserve) -> Balance:
    """Grant the tokens or nothing; the balance says which, and is complete where nothing was granted."""
    of = {"key": order.counter.key_id, "in_month": order.counter.month}
    grant = {**of, "more": order.tokens, "at_most": order.limit}
    if connection.execute(_GRANT, grant).rowcount == 0:
        make_counter(connection, order.counter)
        if connection.execute(_GRANT, grant).rowcount == 0:
            row = connection.execute(_BALANCE, of).one()
            return Balance(row.used, row.reserved, granted=False)
    row_values = {"id": order.id, "key_id": order.counter.key_id, "month": order.counter.month}
    connection.execute(_RESERVATION, {**row_values, "tokens": order.tokens, "expires": order.expires})
    return Balance()


def commit(connection: Connection, order: Commit, *, again: bool = False) -> Balance:
    """Replace a reservation by the tokens that were used; the balance says how many the month has used now.

    Args: again: it was tried before, and may have been done: then the reservation is gone.
    """
    row: Row[tuple[int]] | None = connection.execute(_RELEASE, {"which": order.id}).first()
    if row is not None or not again:
        # A reservation that its lease has released gives nothing back, but what was used counts.
        return Balance(add(connection, order.counter, order.tokens, released=row.tokens if row else 0))
    return Balance()


def add(connection: Connection, counter: Month, tokens: int, *, released: int = 0) -> int:
    """Count tokens as used; return how many the month has used then."""
    values = {"key": counter.key_id, "in_month": counter.month, "more": tokens, "released": released}
    used: int | None = connection.scalar(_ADD, values)
    if used is None:
        make_counter(connection, counter)
        used = connection.execute(_ADD, values).scalar_one()
    return used


def renew(connection: Connection, ids: list[str], until: datetime) -> None:
    """Say that these reservations are still needed."""
    if ids:
        connection.execute(_RENEW, [{"which": each, "until": until} for each in sorted(ids)])


def release_expired(connection: Connection, now: datetime, latest: datetime | None = None) -> int:
    """Give back what processes had reserved that renew it no more; return how many reservations that were.

    The row stays for a while, with no tokens: it says that its commit, should it come after all, has not been done.

    Args: latest: no living process sets a later expiry; one that is later was set while a clock was wrong.
    """
    over = _reservations.c.expires < now
    if latest is not None:
        over |= _reservations.c.expires > latest
    connection.execute(delete(_reservations).where(over, _reservations.c.tokens == 0))
    columns = (_reservations.c.key_id, _reservations.c.month, _reservations.c.id, _reservations.c.tokens)
    released = 0
    # In one order everywhere, so that two replicas never wait for each other's rows.
    for key_id, month, reservation_id, tokens in sorted(
        tuple(row) for row in connection.execute(select(*columns).where(over))
    ):
        this = (_reservations.c.id == reservation_id) & (_reservations.c.tokens == tokens)
        emptied = update(_reservations).where(this, over).values(tokens=0, expires=now + REMEMBERED)
        if connection.execute(emptied).rowcount:  # and no other replica was faster
            add(connection, Month(key_id, month), 0, released=tokens)
            released += 1
    return released


def begin_attempt(connection: Connection, attempt_id: str, now: datetime) -> None:
    """Give a transaction an id by which `was_applied` finds out later whether it was committed."""
    values = {"id": attempt_id, "key_id": _APPLIED, "month": "", "tokens": 0, "expires": now + REMEMBERED}
    connection.execute(_RESERVATION, values)


def end_attempt(connection: Connection, attempt_id: str) -> None:
    """Forget an attempt that has succeeded."""
    connection.execute(delete(_reservations).where(_reservations.c.id == attempt_id))


def was_applied(connection: Connection, attempt_id: str, now: datetime) -> bool:
    """Return whether a transaction was committed whose end nobody saw; if not, it never can be from now on."""
    values = {"id": attempt_id, "key_id": _VOID, "month": "", "tokens": 0, "expires": now + REMEMBERED}
    # Where that transaction still runs, this waits for its end.
    if connection.execute(_insert_missing(connection, _reservations, values)).rowcount:
        return False
    return connection.scalar(select(_reservations.c.key_id).where(_reservations.c.id == attempt_id)) == _APPLIED


def make_counter(connection: Connection, counter: Month) -> None:
    """Make the row of a month if it is not there."""
    values = {"key_id": counter.key_id, "month": counter.month, "used": 0, "reserved": 0}
    connection.execute(_insert_missing(connection, _counters, values))


def _insert_missing(connection: Connection, table: Table, values: dict[str, Any]) -> Insert:
    kind = upsert_sqlite if connection.dialect.name == "sqlite" else upsert_postgres
    statement: Insert = kind(table).values(values)  # type: ignore[assignment]  # both say on_conflict_do_nothing
    return statement.on_conflict_do_nothing()


async def balance(database: Database, counter: Month) -> Balance:
    """Return a counter's figures; one that was never used has zeros."""
    async with database.read() as connection:
        of = {"key": counter.key_id, "in_month": counter.month}
        row = (await connection.execute(_BALANCE, of)).first()
    return Balance(row.used, row.reserved) if row else Balance()
