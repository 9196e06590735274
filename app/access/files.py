"""Files in the database: uploads in chunks, and what batches have written, which is read from the batches' lines.

A file is visible once all of it is stored.  Whose it is stands in every query, so another tenant's is not there.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import accumulate, count
from typing import Any
from uuid import uuid4

from sqlalchemy import Delete, Select, Update, delete, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.access import tables
from app.access.database import Database
from app.batches import NewFile, Page, StoredFile
from app.errors import DeadlineExceeded, FileNotFound, PayloadTooLarge, StorageExceeded, StoreUnavailable
from app.types import Tenant

CHUNK_BYTES = 256 * 1024
"""Bytes of a file in one row, and in one transaction."""
UPLOAD_TIME = timedelta(hours=1)
"""Expiry of a file that is being uploaded: what is left of it after so long belongs to a process that is gone."""
LINES_AT_ONCE = 16
"""Results read in one transaction; each may have megabytes."""
ERASED_ROWS, ERASED_BYTES = 500, 16 * 1024 * 1024
"""What one transaction erases at most: with more of it no other could write in its time."""

_files, _chunks, _lines = tables.files, tables.file_chunks, tables.batch_lines


class FileStore:
    """The files of all tenants."""

    def __init__(self, database: Database, *, max_file_bytes: int, max_stored_bytes: int) -> None:
        """Args: max_stored_bytes: what the uploads of one tenant may take in sum."""
        self._db = database
        self._most_of_file = max_file_bytes
        self._most = max_stored_bytes

    async def write(
        self, tenant: Tenant, content: AsyncIterator[bytes], describe: Callable[[datetime], NewFile]
    ) -> StoredFile:
        """Store a file while it is received; one that does not arrive whole leaves nothing.

        Args: describe: is called with the file's time of creation once all of the content has come; may raise what
            is wrong with it.
        Raises: PayloadTooLarge, StorageExceeded: it, or the tenant's files in sum, would take more than they may.
            DeadlineExceeded: it took longer than `UPLOAD_TIME`, and what had come of it is deleted.  StoreUnavailable.
        """
        file_id, created = f"file-{uuid4().hex}", datetime.now(UTC)
        values = {"id": file_id, "tenant": str(tenant), "purpose": "", "filename": "", "created": created}
        async with self._db.begin() as connection:
            await self._refuse_excess(connection, tenant, 0)
            await connection.execute(insert(_files).values(**values, expires=created + UPLOAD_TIME))
        try:
            size = await self._write_chunks(file_id, content)
            described = asdict(describe(created))
            async with self._db.begin() as connection:
                await self._refuse_excess(connection, tenant, size)
                change = update(_files).where(_files.c.id == file_id).values(size=size, **described)
                if (await connection.execute(change)).rowcount == 0:
                    raise DeadlineExceeded("The file took too long to arrive.")
        except BaseException:
            with suppress(StoreUnavailable):
                await self._erase(file_id)
            raise
        return StoredFile(id=file_id, size=size, created=created, **described)

    async def _write_chunks(self, file_id: str, content: AsyncIterator[bytes]) -> int:
        size = number = 0
        async for data in in_chunks(content, CHUNK_BYTES):
            async with self._db.begin() as connection:
                await connection.execute(insert(_chunks).values(file_id=file_id, number=number, data=data))
            size, number = size + len(data), number + 1
            if size > self._most_of_file:
                limit = self._most_of_file
                raise PayloadTooLarge(f"The file is longer than {limit} bytes.", details={"limit": limit})
        return size

    async def _refuse_excess(self, connection: AsyncConnection, tenant: Tenant, more: int) -> None:
        own = (_files.c.tenant == str(tenant)) & _files.c.batch_id.is_(None)
        # Of several uploads that end at once each counts those before it.
        first = select(_files.c.id).where(own).order_by(_files.c.created, _files.c.id).limit(1)
        await connection.execute(first.with_for_update())
        stored = int(await connection.scalar(select(func.sum(_files.c.size)).where(own)) or 0)
        if stored + more > self._most or stored == self._most:
            raise StorageExceeded(limit=self._most, stored=stored)

    async def read(self, tenant: Tenant, file_id: str) -> StoredFile:
        """Raises: FileNotFound."""
        async with self._db.read() as connection:
            return _file(await _row(connection, tenant, file_id))

    async def list(
        self, tenant: Tenant, page: Page, *, purpose: str | None = None
    ) -> tuple[Sequence[StoredFile], bool]:
        """Return a page of the tenant's files, and whether more follow.

        Raises: FileNotFound: there is no file to begin behind.
        """
        query = select(_files).where(_visible(tenant)).limit(page.limit + 1)
        if purpose is not None:
            query = query.where(_files.c.purpose == purpose)
        async with self._db.read() as connection:
            last = None if page.after is None else await _row(connection, tenant, page.after)
            rows = (await connection.execute(paged(query, _files, page, last))).mappings().all()
        return [_file(row) for row in rows[: page.limit]], len(rows) > page.limit

    async def delete(self, tenant: Tenant, file_id: str) -> None:
        """Delete a file; of what a batch has written the results that it shows.

        Raises: FileNotFound.
        """
        async with self._db.begin() as connection:
            row = await _row(connection, tenant, file_id)
            # Nobody sees it any more, and what is left of it, should this end now, is deleted with the expired ones.
            await connection.execute(update(_files).where(_files.c.id == file_id).values(expires=datetime.now(UTC)))
        await self._erase(file_id, row)

    async def content(self, tenant: Tenant | str, file_id: str) -> AsyncIterator[bytes]:
        """Yield the content; a part that is deleted meanwhile ends it.

        Raises: FileNotFound: before the first part.
        """
        async with self._db.read() as connection:
            row = await _row(connection, tenant, file_id)
        if row["batch_id"] is None:
            parts = self._uploaded(file_id)
        else:
            parts = self.results(row["batch_id"], failed=row["holds_failed"])
        async for part in parts:
            yield part

    async def _uploaded(self, file_id: str) -> AsyncIterator[bytes]:
        for number in count():
            chunk = (_chunks.c.file_id == file_id) & (_chunks.c.number == number)
            async with self._db.read() as connection:
                data: bytes | None = await connection.scalar(select(_chunks.c.data).where(chunk))
            if data is None:
                return
            yield data

    async def results(self, batch_id: str, *, failed: bool | None = None) -> AsyncIterator[bytes]:
        """Yield the results of a batch in the order of its lines, each with its line end.

        Args: failed: only those that failed, or only those that did not; None: both.
        """
        columns = select(_lines.c.number, _lines.c.result).order_by(_lines.c.number).limit(LINES_AT_ONCE)
        query = columns.where(_lines.c.batch_id == batch_id, _lines.c.result.is_not(None))
        if failed is not None:
            query = query.where(_lines.c.state == ("failed" if failed else "completed"))
        last = 0
        while True:
            async with self._db.read() as connection:
                rows = (await connection.execute(query.where(_lines.c.number > last))).all()
            if not rows:
                return
            yield b"".join(row.result for row in rows)
            last = rows[-1].number

    async def delete_expired(self) -> None:
        """Delete the files whose time is over, and what is left of uploads that did not end.

        Raises: StoreUnavailable: the database does not answer.
        """
        over = _files.c.expires <= datetime.now(UTC)
        while True:
            async with self._db.read() as connection:
                row = (await connection.execute(select(_files).where(over).limit(1))).mappings().first()
            if row is None:
                return
            await self._erase(row["id"], row)

    async def _erase(self, file_id: str, row: Any | None = None) -> None:
        """Delete a file, or a part of one, that nobody sees.

        Args: row: its row; None: it is an upload.
        """
        if row is None or row["batch_id"] is None:
            await erase(self._db, _chunks.c.number, _chunks.c.data, _chunks.c.file_id == file_id, delete(_chunks))
        else:
            state = "failed" if row["holds_failed"] else "completed"
            shown = (_lines.c.batch_id == row["batch_id"]) & (_lines.c.state == state) & _lines.c.result.is_not(None)
            await erase(self._db, _lines.c.number, _lines.c.result, shown, update(_lines).values(result=None))
        async with self._db.begin() as connection:
            await connection.execute(delete(_files).where(_files.c.id == file_id))


async def erase(database: Database, number: Any, content: Any, which: Any, change: Delete | Update) -> None:
    """Delete or empty rows, however many they are, in transactions that are short enough for others to write between.

    Args:
        number, content: columns of them.
        which: the rows.
        change: what is done to them, after which they are none of these any more.
    """
    query = select(number, func.coalesce(func.length(content), 0)).where(which).order_by(number).limit(ERASED_ROWS)
    while True:
        async with database.begin() as connection:
            rows = (await connection.execute(query)).all()
            if not rows:
                return
            sums = accumulate(size for _, size in rows)
            numbers = [row[0] for row, total in zip(rows, sums, strict=True) if total <= ERASED_BYTES]
            await connection.execute(change.where(which, number.in_(numbers or [rows[0][0]])))


async def in_chunks(content: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """Yield the same bytes in parts of one size, the last of which may be shorter."""
    buffer = bytearray()
    async for part in content:
        buffer += part
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)


def paged(query: Select[Any], table: Any, page: Page, last: Any | None) -> Select[Any]:
    """Return a query for one page of a table that has `created` and `id`.

    Args: last: the row that the page begins behind.
    """
    position, order = tuple_(table.c.created, table.c.id), (table.c.created, table.c.id)
    if last is not None:
        behind = tuple_(last["created"], last["id"])
        query = query.where(position > behind if page.ascending else position < behind)
    return query.order_by(*(order if page.ascending else (column.desc() for column in order)))


def _visible(tenant: Tenant | str) -> Any:
    fresh = _files.c.expires > datetime.now(UTC)
    return (_files.c.tenant == str(tenant)) & _files.c.size.is_not(None) & fresh


async def _row(connection: AsyncConnection, tenant: Tenant | str, file_id: str) -> Any:
    query = select(_files).where(_visible(tenant), _files.c.id == file_id)
    row = (await connection.execute(query)).mappings().first()
    if row is None:
        raise FileNotFound("You have no file of this id; it may have expired.")
    return row


def _file(row: Any) -> StoredFile:
    return StoredFile(**{name: row[name] for name in "id filename purpose size created expires".split()})
