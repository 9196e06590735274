"""Usage reports by key, day and model, from the counters and the inference log."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import func, select

from app.access import tables
from app.access.database import Database
from app.access.quotas import next_month
from app.errors import InvalidRequest

MONTH = r"^2[0-9]{3}-(0[1-9]|1[0-2])$"
"""The months that reports know: the database and Python agree on their days."""

_log, _counters = tables.inference_log, tables.usage_counters


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """Requests and their tokens, of one day and one model, or summed over either."""

    day: str | None = None
    """None: of all days."""
    model: str | None = None
    """None: of requests that ended before their model was known, or of all models."""
    requests: int
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int
    """Tokens charged to the quota."""


COLUMNS = tuple(field.name for field in fields(UsageRow))
_SUMS = ("requests", "prompt_tokens", "completion_tokens", "charged_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTotal:
    """The usage of one key in a month."""

    key_id: str
    owner: str | None
    role: str | None
    used: int
    reserved: int


class Reports:
    """Reads counters and log."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def by_day_and_model(self, key_id: str, month: str) -> list[UsageRow]:
        """Return a key's generations of one month, UTC; days that the log has deleted are not in it.

        Raises: InvalidRequest: this is no month.
        """
        begin = first_of(month)
        day = func.date(_log.c.created).label("day")
        tokens = [func.sum(_log.c[name]).label(name) for name in _SUMS[1:]]
        query = (
            select(day, _log.c.model, func.count().label("requests"), *tokens)
            .where(_log.c.key_id == key_id, _log.c.created >= begin, _log.c.created < next_month(begin))
            .group_by(day, _log.c.model)
            .order_by(day, _log.c.model)
        )
        async with self._db.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [
            UsageRow(day=str(row["day"]), model=row["model"], **{name: int(row[name]) for name in _SUMS})
            for row in rows
        ]

    async def by_key(self, month: str) -> Sequence[KeyTotal]:
        """Return what each key has used in a month, most first.

        Raises: InvalidRequest: this is no month.
        """
        first_of(month)
        keys = tables.api_keys
        query = (
            select(_counters.c.key_id, keys.c.owner, keys.c.role, _counters.c.used, _counters.c.reserved)
            .outerjoin(keys, keys.c.id == _counters.c.key_id)
            .where(_counters.c.month == month)
            .order_by(_counters.c.used.desc(), _counters.c.key_id)
        )
        async with self._db.read() as connection:
            return [KeyTotal(**row) for row in (await connection.execute(query)).mappings()]


def summed(rows: Iterable[UsageRow], over: Literal["day", "model"]) -> list[UsageRow]:
    """Add up what has the same day and model once one of them is left out.  Args: over: the one left out."""
    totals: dict[tuple[str, str], UsageRow] = {}
    for row in rows:
        left = replace(row, day=None) if over == "day" else replace(row, model=None)
        key = left.day or "", left.model or ""
        before = totals.get(key)
        if before is not None:
            left = replace(left, **{name: getattr(before, name) + getattr(left, name) for name in _SUMS})
        totals[key] = left
    return [totals[key] for key in sorted(totals)]


def first_of(month: str) -> datetime:
    """Return when a month begins, UTC.

    Raises: InvalidRequest: this is no `MONTH`.
    """
    if not re.fullmatch(MONTH, month):
        raise InvalidRequest.of_field("month", "must be a month from 2000-01 to 2999-12, such as 2026-11")
    return datetime(int(month[:4]), int(month[5:]), 1, tzinfo=UTC)
