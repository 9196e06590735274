"""Batches in the database: created, listed and cancelled by their tenant, and moved on by whichever process runs them.

A batch changes its status by one conditional UPDATE, so of several processes one does it.  Its lines are in
`batch_lines.py`.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.access import tables
from app.access.database import Database
from app.access.files import erase, paged
from app.batches import Batch, BatchCounts, BatchError, BatchStatus, BatchUsage, NewBatch, Page, dumped
from app.errors import BatchNotFound, Conflict, RateLimited
from app.types import Tenant

RETRY_SECONDS = 60.0
"""A guess: when one of a tenant's batches ends is not known."""

_batches, _lines, _files = tables.batches, tables.batch_lines, tables.files
_ACTIVE = (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)


class BatchStore:
    """The batches of all tenants."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def create(self, new: NewBatch, *, most: int = sys.maxsize) -> Batch:
        """Store a batch whose file is still to be validated.

        Args: most: batches of the tenant that may not have ended, this one with them.
        Raises: RateLimited: there are so many already.
        """
        values = {name: getattr(new, name) for name in "key_id endpoint input_file_id completion_window".split()}
        values |= {"id": f"batch_{uuid4().hex}", "tenant": str(new.tenant), "labels": new.metadata, "errors": []}
        values |= {"output_lifetime": new.output_lifetime}
        created = datetime.now(UTC)
        values |= {"status": BatchStatus.VALIDATING, "created": created, "expires": created + new.window}
        async with self._db.begin() as connection:
            await self._wait_for_turn(connection, new.tenant)
            await _refuse_excess(connection, new.tenant, most)
            await connection.execute(insert(_batches).values(**values, total=0, completed=0, failed=0))
        return await self.read(new.tenant, values["id"])

    async def read(self, tenant: Tenant, batch_id: str) -> Batch:
        """Raises: BatchNotFound."""
        async with self._db.read() as connection:
            return _batch(await _row(connection, _batches.c.tenant == str(tenant), batch_id))

    async def list(self, tenant: Tenant, page: Page) -> tuple[Sequence[Batch], bool]:
        """Return a page of the tenant's batches, and whether more follow.

        Raises: BatchNotFound: there is no batch to begin behind.
        """
        own = _batches.c.tenant == str(tenant)
        query = select(_batches).where(own).limit(page.limit + 1)
        async with self._db.read() as connection:
            last = None if page.after is None else await _row(connection, own, page.after)
            rows = (await connection.execute(paged(query, _batches, page, last))).mappings().all()
        return [_batch(row) for row in rows[: page.limit]], len(rows) > page.limit

    async def _wait_for_turn(self, connection: AsyncConnection, tenant: Tenant) -> None:
        """Let the transactions in which a tenant's batches are counted and created follow each other.

        SQLite lets only one transaction at a time write.
        """
        if not self._db.sqlite:
            await connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"batches of {tenant}"))))

    async def check_place(self, tenant: Tenant, most: int) -> None:
        """Raises: RateLimited: the tenant has so many batches that have not ended."""
        async with self._db.read() as connection:
            await _refuse_excess(connection, tenant, most)

    async def unfinished(self, tenant: Tenant) -> int:
        """Return how many of the tenant's batches have not ended."""
        async with self._db.read() as connection:
            return await _unfinished(connection, tenant)

    async def counts(self) -> BatchCounts:
        """Return how many batches and lines there are, of all tenants."""
        figures = [func.count(), *(func.sum(_batches.c[name]) for name in ("total", "completed", "failed"))]
        by_status = select(_batches.c.status, *figures).group_by(_batches.c.status)
        running = select(func.count()).select_from(_lines.join(_batches, _batches.c.id == _lines.c.batch_id))
        running = running.where(_batches.c.status == BatchStatus.IN_PROGRESS, _lines.c.state == "running")
        async with self._db.read() as connection:
            rows = (await connection.execute(by_status)).all()
            answering = int(await connection.scalar(running) or 0)
        completed, failed = (sum(int(row[column]) for row in rows) for column in (3, 4))
        left = sum(int(row[2] - row[3] - row[4]) for row in rows if row[0] == BatchStatus.IN_PROGRESS)
        lines = {"waiting": max(0, left - answering), "running": answering, "completed": completed, "failed": failed}
        batches = {str(status): 0 for status in BatchStatus} | {row[0]: int(row[1]) for row in rows}
        return BatchCounts(batches=batches, lines=lines)

    async def cancel(self, tenant: Tenant, batch_id: str) -> Batch:
        """Begin to cancel a batch; one that is being cancelled stays as it is.

        Raises: BatchNotFound.  Conflict: it has ended.
        """
        batch = await self.read(tenant, batch_id)
        if not await self._begin_cancel(batch_id):
            batch = await self.read(tenant, batch_id)
            if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                raise Conflict(f"The batch cannot be cancelled: its status is {batch.status}.")
        return await self.read(tenant, batch_id)

    async def revoke(self, batch_id: str, error: BatchError) -> None:
        """Begin to cancel a batch whose key is good no more."""
        await self._begin_cancel(batch_id, errors=dumped((error,)))

    async def _begin_cancel(self, batch_id: str, **values: Any) -> bool:
        running = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
        values |= {"cancelling": datetime.now(UTC)}
        return await self._move(batch_id, running, BatchStatus.CANCELLING, **values)

    async def claim_validating(self, owner: str, until: datetime) -> Batch | None:
        """Return a batch whose file this process is to validate, for as long as its lease lasts; it has no lines."""
        now = datetime.now(UTC)
        free = (_batches.c.status == BatchStatus.VALIDATING) & (_batches.c.lease.is_(None) | (_batches.c.lease < now))
        async with self._db.begin() as connection:
            first = select(_batches.c.id).where(free).order_by(_batches.c.created).limit(1)
            found = (await connection.execute(first.with_for_update(skip_locked=True))).scalar()
            if found is None:
                return None
            change = update(_batches).where(_batches.c.id == found, free).values(owner=owner, lease=until)
            row = (await connection.execute(change.returning(*_batches.c))).mappings().first()
            # What a validation that did not end has added.
            await connection.execute(delete(_lines).where(_lines.c.batch_id == found))
        return None if row is None else _batch(row)

    async def begin(self, batch_id: str, total: int) -> bool:
        """Let the lines of a validated batch be answered; return False where it was cancelled meanwhile."""
        values = {"total": total, "started": datetime.now(UTC), "owner": None, "lease": None}
        return await self._move(batch_id, (BatchStatus.VALIDATING,), BatchStatus.IN_PROGRESS, **values)

    async def fail(self, batch_id: str, errors: Sequence[BatchError]) -> None:
        """End a batch whose file cannot be answered."""
        values = {"errors": dumped(tuple(errors)), "ended": datetime.now(UTC), "owner": None, "lease": None}
        if await self._move(batch_id, (BatchStatus.VALIDATING,), BatchStatus.FAILED, **values):
            async with self._db.begin() as connection:
                await connection.execute(delete(_lines).where(_lines.c.batch_id == batch_id))

    async def active(self) -> Sequence[Batch]:
        """Return the batches that have lines to answer, or are to be ended, oldest first."""
        query = select(_batches).where(_batches.c.status.in_(_ACTIVE)).order_by(_batches.c.created, _batches.c.id)
        async with self._db.read() as connection:
            return [_batch(row) for row in (await connection.execute(query)).mappings()]

    async def expire(self, batch_id: str) -> None:
        """Stop answering the lines of a batch whose time is over."""
        now = datetime.now(UTC)
        await self._move(batch_id, (BatchStatus.IN_PROGRESS,), BatchStatus.FINALIZING, finalizing=now)

    async def end(self, batch: Batch, status: BatchStatus, *, file_lifetime: timedelta) -> bool:
        """End a batch once no line of it is being answered, and show its results as files.

        Args: file_lifetime: from the batch's end, when they are created, until they expire.
        Returns: whether it has ended; False while another process answers a line, or lines are left of one that is to
            be complete.
        """
        now = datetime.now(UTC)
        async with self._db.begin() as connection:
            if status is BatchStatus.COMPLETED:
                blocked = (_batches.c.completed + _batches.c.failed) < _batches.c.total
            else:
                mine = (_lines.c.batch_id == batch.id) & (_lines.c.state == "running")
                blocked = exists().where(mine, _lines.c.lease >= now)
            values: dict[str, Any] = {"status": status, "ended": now}
            if status is BatchStatus.COMPLETED:
                values["finalizing"] = now
            which = (_batches.c.id == batch.id) & (_batches.c.status == batch.status) & ~blocked
            if (await connection.execute(update(_batches).where(which).values(**values))).rowcount == 0:
                return False
            shown = partial(_add_file, connection, batch, created=now, expires=now + file_lifetime)
            files = {"output_file_id": await shown(failed=False), "error_file_id": await shown(failed=True)}
            await connection.execute(update(_batches).where(_batches.c.id == batch.id).values(**files))
            left = (_lines.c.batch_id == batch.id) & _lines.c.request.is_not(None)
            await connection.execute(update(_lines).where(left).values(request=None, owner=None, lease=None))
        return True

    async def _move(self, batch_id: str, before: Sequence[BatchStatus], status: BatchStatus, **values: Any) -> bool:
        """Change the status, if it is one of those before; return whether it was."""
        which = (_batches.c.id == batch_id) & _batches.c.status.in_(before)
        async with self._db.begin() as connection:
            changed = await connection.execute(update(_batches).where(which).values(status=status, **values))
        return changed.rowcount > 0

    async def delete_old(self, before: datetime) -> None:
        """Delete the batches that ended before a moment, with their lines and files.

        Raises: StoreUnavailable: the database does not answer.
        """
        old = select(_batches.c.id).where(_batches.c.ended < before).limit(1)
        while True:
            async with self._db.begin() as connection:
                batch_id = await connection.scalar(old)
                if batch_id is None:
                    return
                await connection.execute(delete(_files).where(_files.c.batch_id == batch_id))
            await erase(self._db, _lines.c.number, _lines.c.result, _lines.c.batch_id == batch_id, delete(_lines))
            async with self._db.begin() as connection:
                await connection.execute(delete(_batches).where(_batches.c.id == batch_id))


async def _unfinished(connection: AsyncConnection, tenant: Tenant) -> int:
    own = (_batches.c.tenant == str(tenant)) & _batches.c.status.in_((BatchStatus.VALIDATING, *_ACTIVE))
    return int(await connection.scalar(select(func.count()).select_from(_batches).where(own)) or 0)


async def _refuse_excess(connection: AsyncConnection, tenant: Tenant, most: int) -> None:
    """Raises: RateLimited: the tenant has as many batches that have not ended as it may."""
    if await _unfinished(connection, tenant) >= most:
        message = f"You have {most} batches that have not ended (batches.max_unfinished); wait for one, or cancel it."
        raise RateLimited(message, retry_after=RETRY_SECONDS)


async def _add_file(
    connection: AsyncConnection, batch: Batch, *, failed: bool, created: datetime, expires: datetime
) -> str | None:
    """Show the results of a batch that failed, or that did not, as a file; return its id, None where there are none."""
    state: ColumnElement[bool] = _lines.c.state == ("failed" if failed else "completed")
    shown = (_lines.c.batch_id == batch.id) & state & _lines.c.result.is_not(None)
    size = await connection.scalar(select(func.sum(func.length(_lines.c.result))).where(shown))
    if size is None:
        return None
    kind = "error" if failed else "output"
    values = {"id": f"file-{uuid4().hex}", "tenant": batch.tenant, "purpose": "batch_output", "size": int(size)}
    values |= {"filename": f"{batch.id}_{kind}.jsonl", "batch_id": batch.id, "holds_failed": failed}
    await connection.execute(insert(_files).values(**values, created=created, expires=expires))
    return str(values["id"])


async def _row(connection: AsyncConnection, own: ColumnElement[bool], batch_id: str) -> Any:
    row = (await connection.execute(select(_batches).where(own, _batches.c.id == batch_id))).mappings().first()
    if row is None:
        raise BatchNotFound("You have no batch of this id; it may have been deleted after its time.")
    return row


def _batch(row: Any) -> Batch:
    names = set(Batch.__dataclass_fields__) - {"metadata", "status", "errors", "usage"}
    usage = BatchUsage(**{name: row[name] for name in BatchUsage.__dataclass_fields__})
    errors = tuple(BatchError(each["code"], each["message"], each["line"]) for each in row["errors"])
    values = {name: row[name] for name in names}
    return Batch(metadata=row["labels"], status=BatchStatus(row["status"]), errors=errors, usage=usage, **values)
