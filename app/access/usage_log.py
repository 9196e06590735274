"""The inference log: a row for each generation, written behind the requests' back.

A database that is slow or away costs rows once the queue is full (they are counted), never a request its time.  Tokens
that no quota has counted are counted here, in the same transaction.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

from msgspec import structs
from sqlalchemy import Connection, String, delete, insert, select

from app.access import ledger, tables
from app.access.background import BackgroundGroup
from app.access.database import Database
from app.access.faults import Fault
from app.access.ledger import Month
from app.access.queued_writer import QueuedWriter
from app.access.quotas import month_of
from app.config import UsageLogConfig
from app.errors import AppError, StoreUnavailable
from app.types import InferenceRecord

MAX_BATCH = 100
"""Rows of one transaction; preparing them blocks the event loop for a millisecond or two."""
MAX_UNRESOLVED = 100
"""Transactions whose end is unknown; of older ones rows may be written twice."""
RETENTION_BATCH = 1000
"""Rows deleted in one transaction."""

_COLUMNS = tuple(field.name for field in structs.fields(InferenceRecord) if field.name not in ("counted", "cut_at"))
_LENGTHS = {each.name: each.type.length for each in tables.inference_log.c if isinstance(each.type, String)}
"""Characters of the columns that hold text; None is no limit."""
_MAYBE_COMMITTED = frozenset([Fault.UNREACHABLE, Fault.LOCKED])
"""Faults that leave open whether a COMMIT has arrived; the others are a refusal."""
_TEXT_CHARS = 20_000
"""Length limit of a stored prompt or completion; the rest is cut off."""


class Mask(Protocol):
    """Takes personal data out of a text."""

    def __call__(self, text: str, *, cut: bool = False) -> Awaitable[str]:
        """Return the text without it.  Args: cut: whether the text breaks off."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A transaction, by its id in the ledger, and what it was to write."""

    id: str
    records: tuple[InferenceRecord, ...]


class UsageLog:
    """Takes records from requests; lives as long as the application, between `start` and `close`."""

    def __init__(
        self,
        database: Database,
        config: UsageLogConfig,
        *,
        mask: Mask,
        on_drop: Callable[[int], None],
    ) -> None:
        """Args:
        mask: takes personal data out of a text.
        on_drop: is called with the number of records that were lost.
        """
        self._db = database
        self._config = config
        self._mask = mask
        self._on_drop = on_drop
        self._unresolved: deque[_Attempt] = deque(maxlen=MAX_UNRESOLVED)
        """Transactions of which nobody knows whether they were committed, since the last that was."""
        self._succeeded: str | None = None
        """The last attempt that was committed; its id may go."""
        self._writer = QueuedWriter(
            self._write,
            on_drop=self._drop,
            max_batch=MAX_BATCH,
            max_waiting=config.max_waiting,
            flush_seconds=config.flush_seconds,
        )

    @property
    def waiting(self) -> int:
        """How many records are not written yet."""
        return self._writer.waiting

    def write(self, record: InferenceRecord) -> None:
        """Queue a record without waiting; the oldest goes where the queue is full."""
        if self._config.enabled or (record.charged_tokens and not record.counted):
            self._writer.put(record)

    def start(self, background: BackgroundGroup) -> None:
        self._writer.start(background)

    async def close(self) -> None:
        """Write what is queued; what the database does not take in time is dropped and counted."""
        await self._writer.close()

    async def _write(self, batch: Sequence[InferenceRecord]) -> Sequence[InferenceRecord]:
        rows = [await self._masked(record) for record in batch]
        attempt = _Attempt(uuid4().hex, tuple(batch))
        committing = False
        try:
            async with self._db.begin() as connection:
                written = await connection.run_sync(self._written)
                missing = [row for record, row in zip(batch, rows, strict=True) if id(record) not in written]
                await connection.run_sync(partial(_insert, rows=missing, log_rows=self._config.enabled))
                await connection.run_sync(partial(_replace_attempt, before=self._succeeded, now=attempt.id))
                committing = True
        except StoreUnavailable:
            if committing and self._db.breaker.fault in _MAYBE_COMMITTED:
                self._unresolved.append(attempt)
            return batch
        self._unresolved.clear()
        self._succeeded = attempt.id
        return ()

    def _written(self, connection: Connection) -> set[int]:
        """Return the records, by their identity, that an earlier transaction has written though nobody saw its end."""
        now = datetime.now(UTC)
        applied = [each for each in self._unresolved if ledger.was_applied(connection, each.id, now)]
        return {id(record) for each in applied for record in each.records}

    def _drop(self, records: Sequence[InferenceRecord]) -> None:
        self._on_drop(len(records))

    async def _masked(self, record: InferenceRecord) -> InferenceRecord:
        """Mask again what the filters may have let through by their policy."""
        if record.prompt is None and record.answer is None:
            return record
        try:
            prompt = await self._mask_text(record.prompt or "")
            whole, answer, begin = record.answer or "", "", 0
            for end in record.cut_at:
                answer += await self._mask_text(whole[begin:end], cut=True)
                begin = end
            answer += await self._mask_text(whole[begin:])
        except AppError:
            return structs.replace(record, prompt=None, answer=None)
        # Masked before it is cut: half a card number is not recognised as one.
        return structs.replace(record, prompt=prompt[:_TEXT_CHARS], answer=answer[:_TEXT_CHARS])

    async def _mask_text(self, text: str, *, cut: bool = False) -> str:
        # Postgres stores no NUL.
        return await self._mask(text.replace("\x00", ""), cut=cut)

    async def delete_old(self, now: datetime | None = None) -> int:
        """Delete what is past its time, a bounded number of rows at once; return how many.

        Raises: StoreUnavailable: the database does not answer.
        """
        if not self._config.retention_days:
            return 0
        log, deleted = tables.inference_log, 0
        before = (now or datetime.now(UTC)) - timedelta(days=self._config.retention_days)
        some = select(log.c.id).where(log.c.created < before).limit(RETENTION_BATCH)
        while True:
            async with self._db.begin() as connection:
                count = (await connection.execute(delete(log).where(log.c.id.in_(some)))).rowcount
            deleted += count
            if count < RETENTION_BATCH:
                return deleted


def _replace_attempt(connection: Connection, *, before: str | None, now: str) -> None:
    """Let the ledger remember one attempt of this process at a time."""
    if before is not None:
        ledger.end_attempt(connection, before)
    ledger.begin_attempt(connection, now, datetime.now(UTC))


def _insert(connection: Connection, *, rows: Sequence[InferenceRecord], log_rows: bool) -> None:
    if not rows:
        return
    if log_rows:
        connection.execute(insert(tables.inference_log), [_values(row) for row in rows])
    uncounted: dict[Month, int] = {}
    for row in rows:
        if not row.counted and row.charged_tokens:
            counter = Month(row.key_id, month_of(row.created))
            uncounted[counter] = uncounted.get(counter, 0) + row.charged_tokens
    # In one order everywhere, so that two replicas never wait for each other's rows.
    for counter, tokens in sorted(uncounted.items()):
        ledger.add(connection, counter, tokens)


def _values(row: InferenceRecord) -> dict[str, Any]:
    return {name: _storable(getattr(row, name), _LENGTHS.get(name)) for name in _COLUMNS}


def _storable(value: Any, length: int | None) -> Any:
    """Return a text as Postgres takes it: some come from other servers, and one that it refuses would hold up all."""
    return value.replace("\x00", "")[:length] if isinstance(value, str) else value
