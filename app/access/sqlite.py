"""SQLite as this service opens it: its settings, its transactions, its file.

Decides when a transaction takes the lock and when its commit waits for the disk.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.access.faults import Fault
from app.errors import ConfigError

BUSY_SECONDS = 2.0
"""How long a statement waits for the lock of another process: as long as a request waits for any database."""
READ_ONLY = "llm_service_read_only"
"""The execution option of transactions that only read."""
ADVICE = {
    Fault.DAMAGED: "restore a copy, or move the file away to begin with an empty database",
    Fault.FULL: "make room on its disk",
    Fault.LOCKED: "another program holds it; end that program",
    Fault.READ_ONLY: "make the file and its folder writable for this user, and see that their disk has room",
}
"""What the operator can do about a fault."""

T = TypeVar("T")


class SQLiteDialect(SQLiteDialect_aiosqlite):
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


registry.register("sqlite.llm_service", __name__, SQLiteDialect.__name__)


def open_sqlite(url: URL, pool_size: int) -> AsyncEngine:
    """Return an engine whose commits survive a power cut; opens no file yet."""
    engine = create_async_engine(url.set(drivername="sqlite+llm_service"), pool_size=pool_size, hide_parameters=True)
    _set_up_connections(engine.sync_engine, "FULL")
    return engine


def _set_up_connections(engine: Engine, synchronous: str) -> None:
    """Let every new connection have our settings.  Args: synchronous: the value of SQLite's pragma."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        # The driver would begin transactions at a time of its own choice; we say BEGIN ourselves.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_SECONDS * 1000:.0f}",
            "journal_mode = WAL",
            f"synchronous = {synchronous}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once where another has written in between.
        reading = connection.get_execution_options().get(READ_ONLY)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


class TransactionThreads:
    """Threads with their own connections to SQLite.

    One writes: it has a connection whose commits wait for the disk, and one whose do not.  One reads, which no writer
    holds up.  A transaction through aiosqlite changes threads for each of its statements; one that runs here does so
    once.
    """

    def __init__(self, url: URL) -> None:
        self._durable, self._fast = [_open_blocking(url, synchronous) for synchronous in ("FULL", "NORMAL")]
        self._read_only = _open_blocking(url, "NORMAL").execution_options(**{READ_ONLY: True})
        self._writer = ThreadPoolExecutor(1, "sqlite-write")
        self._reader = ThreadPoolExecutor(1, "sqlite-read")

    async def run(self, work: Callable[[Connection], T], *, durable: bool) -> T:
        """Run a transaction and return what it returns.  Args: durable: its commit waits for the disk."""
        engine = self._durable if durable else self._fast
        return await asyncio.get_running_loop().run_in_executor(self._writer, _run_transaction, engine, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run a transaction that only reads and return what it returns."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, _run_transaction, self._read_only, work)

    def close(self) -> None:
        """Wait for the transactions that run, and close the connections."""
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._read_only.dispose()
        self._durable.dispose()
        self._fast.dispose()


def _open_blocking(url: URL, synchronous: str) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"), hide_parameters=True, connect_args={"check_same_thread": False}
    )
    _set_up_connections(engine, synchronous)
    return engine


def _run_transaction(engine: Engine, work: Callable[[Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def create_file(path: Path) -> None:
    """Create an empty file that only its owner may read, if there is none; SQLite gives its other files the same mode.

    Raises: ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigError(
            f"the database {path} cannot be written: {error.strerror}; "
            "make it and its folder writable, name another folder as APP__DATA_DIR, or set DATABASE_URL"
        ) from None


def copy_file(path: Path, target: Path) -> None:
    """Write a consistent copy of a database's file while others read and write it.

    Raises: FileExistsError, OSError: the copy cannot be written; what there is of it is removed.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
    except sqlite3.Error as error:
        target.unlink()
        raise OSError(None, str(error)) from error
