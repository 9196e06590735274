"""The inference log: a row for each ask, written behind the requests' back.

A request only puts its record in a queue.  One task writes what has come together, at the latest after the flush
interval; a database that is slow or away costs rows once the queue is full (they are counted), never a request its
time.  What no quota has counted is counted here, in the same transaction.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Connection, delete, insert, select

from app.access import ledger, tables
from app.access.database import Database
from app.access.ledger import Month
from app.access.quotas import month_of
from app.config import UsageLogConfig
from app.errors import AppError, StoreUnavailable
from app.types import InferenceRecord

MAX_BATCH = 100
"""Rows of one transaction; preparing them holds up the event loop for a millisecond or two."""
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 5.0
"""How long a shutdown waits for the last rows."""
RETENTION_BATCH = 1000
"""Rows deleted in one transaction."""

_COLUMNS = tuple(field.name for field in fields(InferenceRecord) if field.name != "counted")
_TEXT_CHARS = 20_000
"""Of a prompt or an answer; the rest is not kept."""

_log = structlog.get_logger("llm_service")


class UsageLog:
    """Takes records from requests; lives as long as the application, between `start` and `close`."""

    def __init__(
        self,
        database: Database,
        config: UsageLogConfig,
        *,
        mask: Callable[[str], Awaitable[str]],
        on_drop: Callable[[int], None],
    ) -> None:
        """Args:
        mask: takes personal data out of a text.
        on_drop: is told how many records were lost.
        """
        self._db = database
        self._config = config
        self._mask = mask
        self._on_drop = on_drop
        self._waiting: deque[InferenceRecord] = deque()
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    def write(self, record: InferenceRecord) -> None:
        """Take a record without waiting; where there is no more room the oldest goes."""
        if not self._config.enabled and (record.counted or not record.charged_tokens):
            return
        self._waiting.append(record)
        self._bound()
        self._news.set()

    async def start(self) -> None:
        self._writing = asyncio.create_task(self._write_for_ever())

    async def close(self) -> None:
        """Write what is left; what the database does not take in time is dropped and counted."""
        self._closing.set()
        self._news.set()
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=CLOSE_SECONDS)
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        if self._waiting:
            self._on_drop(len(self._waiting))
            _log.error("Rows of the inference log were lost at the end", rows=len(self._waiting))

    async def _write_for_ever(self) -> None:
        while not self._closing.is_set() or self._waiting:
            self._news.clear()
            if not self._waiting:
                await self._news.wait()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._config.flush_seconds)
            while self._waiting:
                if not await self._write_batch():
                    await asyncio.sleep(RETRY_SECONDS)

    async def _write_batch(self) -> bool:
        batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
        try:
            rows = [await self._masked(record) for record in batch]
            async with self._db.begin() as connection:
                await connection.run_sync(partial(_insert, rows=rows, keep=self._config.enabled))
        except (StoreUnavailable, asyncio.CancelledError) as error:
            self._waiting.extendleft(reversed(batch))
            self._bound()
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        except Exception as error:  # noqa: BLE001  # rows that cannot be written must not stop those behind them
            self._on_drop(len(batch))
            _log.error("Rows of the inference log cannot be written", rows=len(batch), error=type(error).__name__)
        return True

    def _bound(self) -> None:
        over = len(self._waiting) - self._config.max_waiting
        for _ in range(over):
            self._waiting.popleft()
        if over > 0:
            self._on_drop(over)

    async def _masked(self, record: InferenceRecord) -> InferenceRecord:
        """Mask again what the filters may have let through by their policy."""
        if record.prompt is None and record.answer is None:
            return record
        try:
            # Postgres keeps no NUL.
            prompt, answer = [
                await self._mask((text or "")[:_TEXT_CHARS].replace("\x00", ""))
                for text in (record.prompt, record.answer)
            ]
        except AppError:
            return replace(record, prompt=None, answer=None)
        return replace(record, prompt=prompt, answer=answer)

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


def _insert(connection: Connection, *, rows: list[InferenceRecord], keep: bool) -> None:
    if keep:
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
    return {name: getattr(row, name) for name in _COLUMNS}
