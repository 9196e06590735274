"""The connection to the database, SQLite or Postgres, and its schema.

Decides how each is spoken to, how long to wait, and what counts as an outage.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.access.circuit_breaker import CircuitBreaker
from app.access.database_url import parse_database_url, shown, without_secrets
from app.errors import ConfigError, StoreUnavailable

WAIT_SECONDS = 2.0
"""How long a request waits for the database before that counts as an outage."""
MIGRATION_SECONDS = 60.0

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_LOCK = 0x6C6C6D73
"""Any number, as long as every replica takes the same."""
_POOL_SIZE = 5
_READING = "llm_service_reading"

T = TypeVar("T")


class Database:
    """One database; opens nothing before it is used."""

    def __init__(self, url: str, *, wait_seconds: float = WAIT_SECONDS) -> None:
        """Args: wait_seconds: after so long without an answer there is an outage.
        Raises: ConfigError: the URL is neither SQLite's nor Postgres'.
        """
        self._wait_seconds = wait_seconds
        self._url = parse_database_url(url)
        self.sqlite = self._url.get_backend_name() == "sqlite"
        self.engine = _open_sqlite(self._url) if self.sqlite else _open_postgres(self._url)
        self._reading = self.engine.execution_options(**{_READING: True})
        self._quick = _Quick(self._url) if self.sqlite else None
        self.breaker = CircuitBreaker(self._probe)

    @property
    def name(self) -> str:
        """Where the database is, without anything secret of its URL."""
        return shown(self._url)

    @asynccontextmanager
    async def begin(self, seconds: float | None = None) -> AsyncIterator[AsyncConnection]:
        """Run the block in one transaction, on SQLite one that may write from its start.

        Raises: StoreUnavailable: the database does not answer, or not in time.
        """
        with self._outages(seconds):
            async with asyncio.timeout(seconds or self._wait_seconds), self.engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def read(self, seconds: float | None = None) -> AsyncIterator[AsyncConnection]:
        """Run the block in one transaction that only reads; on SQLite no writer holds it up.

        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(seconds):
            async with asyncio.timeout(seconds or self._wait_seconds), self._reading.begin() as connection:
                yield connection

    async def quickly(self, work: Callable[[Connection], T]) -> T:
        """Run a short transaction on the way of a request.

        SQLite through asyncio is one change of threads for each statement and more; here it is one for all of them.
        Its commit survives the death of the process; the next ordinary one, at most a second later, makes it survive
        a power cut too.

        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(None):
            if self._quick:
                return await self._quick.run(work)
            async with asyncio.timeout(self._wait_seconds), self.engine.begin() as connection:
                return await connection.run_sync(work)

    @contextmanager
    def _outages(self, seconds: float | None) -> Iterator[None]:
        """Translate what an outage raises, and report to the breaker how the transaction ended."""
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and seconds is not None and seconds < self._wait_seconds:
                self.breaker.slow()
            else:
                self.breaker.trip()
            raise StoreUnavailable() from error
        else:
            self.breaker.reset()

    async def _probe(self) -> None:
        # A transaction that may write: on SQLite one that only reads succeeds under a writer that never ends.
        async with self.begin() as connection:
            await connection.execute(text("SELECT 1"))

    async def migrate(self) -> None:
        """Bring the schema up to date; of several processes that start at once, one does and the others wait.

        Raises: ConfigError: the database cannot be opened, or is newer than this program.
        """
        try:
            await self._check_or_upgrade()
        except StoreUnavailable as error:
            raise ConfigError(f"the database {self.name} cannot be used: {self.reason_of(error)}") from None

    def reason_of(self, error: StoreUnavailable) -> str:
        """Return the first line of what the database or its driver said, without anything secret of the URL."""
        cause = error.__cause__
        said = str(getattr(cause, "orig", None) or cause or "").splitlines()
        return without_secrets(self._url, said[0]) if said else "it does not answer"

    async def _check_or_upgrade(self) -> None:
        if self.sqlite:
            self._make_file()
        if await self.revision() == head_revision():
            return
        async with self.begin(MIGRATION_SECONDS) as connection:
            if not self.sqlite:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            await connection.run_sync(_upgrade)

    async def revision(self) -> str | None:
        """Return the schema's revision, None for a database without one."""
        async with self.read(MIGRATION_SECONDS) as connection:
            return await connection.run_sync(_revision)

    def exists(self) -> bool:
        """Whether SQLite's file is there; True for Postgres, which has none."""
        return not self.sqlite or Path(self._url.database or "").exists()

    async def problems(self) -> list[str]:
        """Return what SQLite finds wrong with its file; Postgres looks after itself."""
        if not self.sqlite:
            return []
        async with self.read(MIGRATION_SECONDS) as connection:
            found = (await connection.execute(text("PRAGMA integrity_check"))).scalars()
            return [line for line in found if line != "ok"]

    def _make_file(self) -> None:
        """Make an empty file that only its owner may read; SQLite gives its other files the same rights."""
        path = Path(self._url.database or "")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"the database {path} cannot be written: {error.strerror}; "
                "make that folder writable, name another as APP__DATA_DIR, or set DATABASE_URL"
            ) from None

    async def close(self) -> None:
        if self._quick:
            self._quick.close()
        await self.engine.dispose()


def head_revision() -> str:
    """Return the newest revision that this program knows; files are named for theirs, so that Alembic is not needed."""
    return max(path.name.partition("_")[0] for path in (_MIGRATIONS / "versions").glob("[0-9]*_*.py"))


def _open_postgres(url: URL) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_SIZE,
        pool_timeout=WAIT_SECONDS,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={"timeout": WAIT_SECONDS, "server_settings": {"application_name": "llm-service"}},
    )


def _open_sqlite(url: URL) -> AsyncEngine:
    engine = create_async_engine(url, pool_size=_POOL_SIZE, hide_parameters=True)
    _prepare_sqlite(engine.sync_engine, "FULL")
    return engine


def _prepare_sqlite(engine: Engine, synchronous: str) -> None:
    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        # The driver would begin transactions at a time of its own choice; we say BEGIN ourselves.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {WAIT_SECONDS * 1000:.0f}",
            "journal_mode = WAL",
            f"synchronous = {synchronous}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once where another has written in between.
        reading = connection.get_execution_options().get(_READING)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


class _Quick:
    """A thread with its own connection to SQLite."""

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(
            url.set(drivername="sqlite+pysqlite"), hide_parameters=True, connect_args={"check_same_thread": False}
        )
        _prepare_sqlite(self._engine, "NORMAL")
        self._thread = ThreadPoolExecutor(1, "sqlite-quick")

    async def run(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    def _work(self, work: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            return work(connection)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._engine.dispose()


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: Connection) -> None:
    # Late: Alembic takes a third of a second to import, and most starts have nothing to upgrade.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError:
        raise ConfigError("the database is newer than this program; install the version that made it") from None
