"""The response cache's level that outlives the process and is shared by replicas."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from app.access import tables
from app.access.background import BackgroundGroup
from app.access.database import Database
from app.access.queued_writer import QueuedWriter
from app.errors import StoreUnavailable

WAIT_SECONDS = 0.5
"""How long a request waits to learn whether its response is there."""
MAX_BATCH = 16
"""Responses written in one transaction."""
MAX_WAITING = 64
"""Responses queued; of more than that the oldest are not stored."""
EXPIRED_BATCH = 1000
"""Rows deleted in one transaction."""

_cache = tables.completion_cache


class ResponseCache:
    """Responses by digest, in the database; the `ResponseStore` of `engine.persistent_cache`."""

    def __init__(self, database: Database, ttl_seconds: float) -> None:
        self._db = database
        self._ttl = timedelta(seconds=ttl_seconds)
        self._writer = QueuedWriter(
            self._write, on_drop=lambda lost: None, max_batch=MAX_BATCH, max_waiting=MAX_WAITING
        )

    def start(self, background: BackgroundGroup) -> None:
        self._writer.start(background)

    async def get(self, key: bytes) -> bytes | None:
        """Return what is stored and not too old; None also where the database does not answer."""
        if self._db.breaker.degraded:
            return None
        fresh = (_cache.c.key == key) & (_cache.c.expires > datetime.now(UTC))
        try:
            async with self._db.read(WAIT_SECONDS) as connection:
                response: bytes | None = await connection.scalar(select(_cache.c.answer).where(fresh))
        except StoreUnavailable:
            return None
        return response

    def put(self, key: bytes, answer: bytes) -> None:
        """Store a response, without waiting for it; the newest wins."""
        self._writer.put((key, answer))

    async def _write(self, batch: Sequence[tuple[bytes, bytes]]) -> Sequence[tuple[bytes, bytes]]:
        responses = dict(batch)
        expires = datetime.now(UTC) + self._ttl
        rows = [{"key": key, "answer": answer, "expires": expires} for key, answer in sorted(responses.items())]
        # It is only a cache, and another replica may have stored the same.
        with suppress(StoreUnavailable, IntegrityError):
            async with self._db.begin() as connection:
                await connection.execute(delete(_cache).where(_cache.c.key.in_(responses)))
                await connection.execute(insert(_cache), rows)
        return ()

    async def delete_expired(self) -> None:
        """Delete what is too old, a bounded number of rows at once.

        Raises: StoreUnavailable: the database does not answer.
        """
        old = select(_cache.c.key).where(_cache.c.expires <= datetime.now(UTC)).limit(EXPIRED_BATCH)
        count = EXPIRED_BATCH
        while count == EXPIRED_BATCH:
            async with self._db.begin() as connection:
                count = (await connection.execute(delete(_cache).where(_cache.c.key.in_(old)))).rowcount

    async def close(self) -> None:
        """Write what is queued."""
        await self._writer.close()
