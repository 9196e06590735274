"""The connection to the database, SQLite or Postgres, and its schema.

Decides how each is spoken to, how long to wait, and what counts as an outage.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.access.circuit_breaker import CircuitBreaker
from app.access.database_url import parse_database_url, shown, without_secrets
from app.access.faults import Fault, fault_of
from app.errors import ConfigError, StoreUnavailable

WAIT_SECONDS = 2.0
"""How long a request waits for the database before that counts as an outage."""
MIGRATION_SECONDS = 60.0
LOCKED_START_SECONDS = 20.0
"""How long a start waits for SQLite's file: another process that starts may be migrating, on a busy machine."""

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_LOCK = 0x6C6C6D73
"""Any number, as long as every replica takes the same."""
START_CHECK_BYTES = 256 * 1024 * 1024
"""A larger SQLite file is not looked through at the start: it would take seconds."""

_ADVICE_SQLITE = {
    Fault.DAMAGED: "restore a copy, or move the file away to begin with an empty database",
    Fault.FULL: "make room on its disk",
    Fault.LOCKED: "another program holds it; end that program",
    Fault.READ_ONLY: "make the file and its folder writable for this user, and see that their disk has room",
}
_POOL_SIZE = 5
_STOP_SECONDS = 2 * WAIT_SECONDS
"""How long the end waits for statements of transactions that were cancelled."""
_READING = "llm_service_reading"
_WRITE_NOTHING_NEW = "UPDATE alembic_version SET version_num = version_num"

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
        with self._outages(seconds, writing=False):
            async with asyncio.timeout(seconds or self._wait_seconds), self._reading.begin() as connection:
                yield connection

    async def quickly(self, work: Callable[[Connection], T], *, durable: bool = False) -> T:
        """Run a short transaction on the way of a request.

        SQLite through asyncio is one change of threads for each statement and more; here it is one for all of them.

        Args: durable: the commit survives a power cut, for the price of waiting for the disk; otherwise SQLite's only
            survives the death of the process until the next durable one.
        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(None):
            if self._quick:
                return await self._quick.run(work, durable=durable)
            async with asyncio.timeout(self._wait_seconds), self.engine.begin() as connection:
                return await connection.run_sync(work)

    async def read_quickly(self, work: Callable[[Connection], T]) -> T:
        """Run a short transaction that only reads on the way of a request: on SQLite one change of threads.

        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(None, writing=False):
            async with asyncio.timeout(self._wait_seconds):
                if self._quick:
                    return await self._quick.read(work)
                async with self._reading.begin() as connection:
                    return await connection.run_sync(work)

    @contextmanager
    def _outages(self, seconds: float | None, *, writing: bool = True) -> Iterator[None]:
        """Translate what an outage raises, and report to the breaker how the transaction ended."""
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and seconds is not None and seconds < self._wait_seconds:
                self.breaker.slow()
                raise StoreUnavailable() from error
            if writing and isinstance(error, TimeoutError):
                self.time_out()
            else:
                self.breaker.trip(fault_of(error))
            raise self.unavailable() from error
        else:
            self.breaker.reset(wrote=writing)

    def time_out(self) -> None:
        """Note that a transaction that writes was not over in its time: on SQLite others hold the file."""
        self.breaker.trip(Fault.LOCKED if self.sqlite else Fault.AWAY)

    def unavailable(self) -> StoreUnavailable:
        """Return the error of who does not even try while the breaker is open."""
        return StoreUnavailable(self.breaker.fault or Fault.AWAY)

    async def _probe(self) -> None:
        # A transaction that may write: on SQLite one that only reads succeeds under a writer that never ends.  Where
        # writing failed one that does write, as nothing else finds out whether the disk is full still.
        fault = self.breaker.fault
        if fault is not None and fault.only_writes:
            await self.write_nothing_new()
            return
        async with self.begin() as connection:
            await connection.execute(text("SELECT 1"))

    async def write_nothing_new(self) -> None:
        """Write what is there already: the only way to find out whether the disk has room.

        Raises: StoreUnavailable: it has none, or as for `begin`.
        """
        async with self.begin() as connection:
            await connection.execute(text(_WRITE_NOTHING_NEW))

    async def migrate(self) -> None:
        """Bring the schema up to date; of several processes that start at once, one does and the others wait.

        Raises: ConfigError: the database cannot be opened, or is newer than this program.
        """
        latest = time.monotonic() + LOCKED_START_SECONDS
        while True:
            try:
                return await self._check_or_upgrade()
            except StoreUnavailable as error:
                cause = error.__cause__
                if cause is None or fault_of(cause) is not Fault.LOCKED or time.monotonic() > latest:
                    raise ConfigError(f"the database {self.name} cannot be used: {self.reason_of(error)}") from None

    def reason_of(self, error: StoreUnavailable) -> str:
        """Return the first line of what the driver said, without secrets of its URL, and what may help."""
        cause = error.__cause__
        said = str(getattr(cause, "orig", None) or cause or "").splitlines()
        reason = without_secrets(self._url, said[0]) if said else "it does not answer in time"
        advice = _ADVICE_SQLITE.get(fault_of(cause) if cause else Fault.AWAY) if self.sqlite else None
        return f"{reason}; {advice}" if advice else reason

    async def _check_or_upgrade(self) -> None:
        if self.sqlite:
            self._make_file()
        if await self.revision() == head_revision():
            if self.sqlite and self.size() <= START_CHECK_BYTES:
                await self._refuse_damaged()
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
        return self.path is None or self.path.exists()

    @property
    def path(self) -> Path | None:
        """Return SQLite's file, None for Postgres."""
        return Path(self._url.database or "") if self.sqlite else None

    @property
    def host(self) -> str | None:
        """Return the machine of Postgres, None for SQLite and for a socket."""
        # An "@" that is not escaped belongs to the password.
        return self._url.host.rpartition("@")[2] if self._url.host else None

    @property
    def where(self) -> str:
        """Where the database is, without user, password and options."""
        if self.path is not None:
            return str(self.path)
        return f"Postgres on {self.host or 'this machine'}, port {self._url.port or 5432}, {self._url.database}"

    def size(self) -> int:
        """Return the bytes of SQLite's file, 0 where there is none."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    async def problems(self, *, quick: bool = False) -> list[str]:
        """Return what SQLite finds wrong with its file; Postgres looks after itself.

        Args: quick: looks at the structure, in a tenth of the time, and not at whether indexes fit their tables.
        Raises: StoreUnavailable: it is so damaged that nothing can be read.
        """
        if not self.sqlite:
            return []
        async with self.read(MIGRATION_SECONDS) as connection:
            found = (await connection.execute(text(f"PRAGMA {'quick' if quick else 'integrity'}_check"))).scalars()
            return [line for line in found if line != "ok"]

    async def copy_to(self, target: Path) -> None:
        """Write a consistent copy of SQLite's file while others read and write it.

        Raises: FileExistsError, OSError: the copy cannot be written; what there is of it is removed.
        """
        if self.path is not None:
            await asyncio.to_thread(_copy_sqlite, self.path, target)

    async def _refuse_damaged(self) -> None:
        """Raises: ConfigError: a page of the file is not as SQLite wrote it; keys or quotas may be wrong."""
        if found := await self.problems(quick=True):
            raise ConfigError(
                f"the database {self.name} is damaged ({found[0].splitlines()[0]}): {_ADVICE_SQLITE[Fault.DAMAGED]}"
            )

    def _make_file(self) -> None:
        """Make an empty file that only its owner may read; SQLite gives its other files the same rights."""
        path = Path(self._url.database or "")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise ConfigError(
                f"the database {path} cannot be written: {error.strerror}; "
                "make it and its folder writable, name another folder as APP__DATA_DIR, or set DATABASE_URL"
            ) from None

    async def close(self) -> None:
        if self._quick:
            self._quick.close()
        await self.engine.dispose()
        if stopping := getattr(self.engine.dialect, "stopping", None):
            await asyncio.wait(stopping, timeout=_STOP_SECONDS)


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


class _SQLiteDialect(SQLiteDialect_aiosqlite):
    """Gives a cancelled transaction's connection up at once; its thread rolls back and closes it.

    SQLAlchemy's own closes it in a task that nobody owns.  Cancelled a second time (by a time limit that runs out while
    the service ends), it stops the thread that this task waits for, and the task then waits for ever, cancelled or not.
    """

    supports_statement_cache = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stopping: set[asyncio.Future[object]] = set()
        """Of connections that were given up, and are not yet closed."""

    def do_terminate(self, dbapi_connection: DBAPIConnection) -> None:
        stopped = dbapi_connection.driver_connection.stop()
        if stopped is not None:
            self.stopping.add(stopped)
            stopped.add_done_callback(self.stopping.discard)


registry.register("sqlite.llm_service", __name__, _SQLiteDialect.__name__)


def _open_sqlite(url: URL) -> AsyncEngine:
    engine = create_async_engine(url.set(drivername="sqlite+llm_service"), pool_size=_POOL_SIZE, hide_parameters=True)
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
    """Threads with their own connections to SQLite.

    One writes: it has a connection whose commits wait for the disk, and one whose do not.  One reads, which no writer
    holds up.
    """

    def __init__(self, url: URL) -> None:
        self._durable, self._fast = [_open_quick(url, synchronous) for synchronous in ("FULL", "NORMAL")]
        self._read_only = _open_quick(url, "NORMAL").execution_options(**{_READING: True})
        self._thread = ThreadPoolExecutor(1, "sqlite-quick")
        self._reader = ThreadPoolExecutor(1, "sqlite-read")

    async def run(self, work: Callable[[Connection], T], *, durable: bool) -> T:
        engine = self._durable if durable else self._fast
        return await asyncio.get_running_loop().run_in_executor(self._thread, _work, engine, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reader, _work, self._read_only, work)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._read_only.dispose()
        self._durable.dispose()
        self._fast.dispose()


def _open_quick(url: URL, synchronous: str) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"), hide_parameters=True, connect_args={"check_same_thread": False}
    )
    _prepare_sqlite(engine, synchronous)
    return engine


def _work(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _copy_sqlite(path: Path, target: Path) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        target.unlink()
        raise OSError(None, str(error)) from error


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
