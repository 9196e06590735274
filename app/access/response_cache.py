"""Stored answers: the response cache's level that outlives the process and is shared by replicas."""

import asyncio
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from app.access import tables
from app.access.database import Database
from app.errors import StoreUnavailable

WAIT_SECONDS = 0.5
"""How long a request waits to learn whether its answer is there."""
OUTAGE_SECONDS = 1.0
"""After a failure nobody asks for so long."""
MAX_WRITING = 64
"""Answers being written; one more is not kept."""
EXPIRED_BATCH = 1000
"""Rows deleted in one transaction."""

_answers = tables.completion_cache


class StoredAnswers:
    """Answers by digest, in the database; `engine.stored.AnswerStore`."""

    def __init__(self, database: Database, ttl_seconds: float) -> None:
        self._db = database
        self._ttl = timedelta(seconds=ttl_seconds)
        self._writing: set[asyncio.Task[None]] = set()
        self._broken_until = 0.0

    async def get(self, key: bytes) -> bytes | None:
        """Return what is kept and not too old; None also where the database does not answer."""
        now = asyncio.get_running_loop().time()
        if now < self._broken_until:
            return None
        fresh = (_answers.c.key == key) & (_answers.c.expires > datetime.now(UTC))
        try:
            async with self._db.read(WAIT_SECONDS) as connection:
                answer: bytes | None = await connection.scalar(select(_answers.c.answer).where(fresh))
        except StoreUnavailable:
            self._broken_until = now + WAIT_SECONDS + OUTAGE_SECONDS
            return None
        return answer

    def put(self, key: bytes, answer: bytes) -> None:
        """Keep an answer, without waiting for it; the newest wins."""
        if len(self._writing) < MAX_WRITING:
            task = asyncio.create_task(self._write(key, answer))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write(self, key: bytes, answer: bytes) -> None:
        try:
            async with self._db.begin() as connection:
                await connection.execute(delete(_answers).where(_answers.c.key == key))
                values = {"key": key, "answer": answer, "expires": datetime.now(UTC) + self._ttl}
                await connection.execute(insert(_answers).values(values))
        except (StoreUnavailable, IntegrityError):
            return  # it is only a cache; another replica may have stored the same

    async def delete_expired(self) -> None:
        """Delete what is too old, a bounded number of rows at once.

        Raises: StoreUnavailable: the database does not answer.
        """
        old = select(_answers.c.key).where(_answers.c.expires <= datetime.now(UTC)).limit(EXPIRED_BATCH)
        count = EXPIRED_BATCH
        while count == EXPIRED_BATCH:
            async with self._db.begin() as connection:
                count = (await connection.execute(delete(_answers).where(_answers.c.key.in_(old)))).rowcount

    async def close(self) -> None:
        """Let what is being written be written."""
        await asyncio.gather(*self._writing, return_exceptions=True)
