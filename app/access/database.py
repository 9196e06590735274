"""The connection to the database, SQLite or Postgres, and its schema.

Decides how long to wait, and what counts as an outage; `sqlite.py` decides how SQLite is used.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.access import sqlite
from app.access.circuit_breaker import CircuitBreaker
from app.access.database_url import parse_database_url, shown, without_secrets
from app.access.faults import Fault, fault_of
from app.errors import ConfigError, StoreUnavailable

WAIT_SECONDS = sqlite.BUSY_SECONDS
"""How long a request waits for the database before that counts as an outage."""
MIGRATION_SECONDS = 60.0
LOCKED_START_SECONDS = 20.0
"""How long a start waits for SQLite's file: another process that starts may be migrating, on a busy machine."""

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_LOCK = 0x6C6C6D73
"""Any number, as long as every replica takes the same."""
START_CHECK_BYTES = 256 * 1024 * 1024
"""A larger SQLite file is not looked through at the start: it would take seconds."""

_POOL_SIZE = 5
_STOP_SECONDS = 2 * WAIT_SECONDS
"""How long the end waits for statements of transactions that were cancelled."""
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
        self.engine = sqlite.open_sqlite(self._url, _POOL_SIZE) if self.sqlite else _open_postgres(self._url)
        self._reading = self.engine.execution_options(**{sqlite.READ_ONLY: True})
        self._transactions = sqlite.TransactionThreads(self._url) if self.sqlite else None
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

    async def run_in_transaction(self, work: Callable[[Connection], T], *, durable: bool = False) -> T:
        """Run a short transaction, which a request waits for, in the least time; on SQLite in a thread of its own.

        Args: durable: the commit survives a power cut, for the price of waiting for the disk; otherwise SQLite's only
            survives the death of the process until the next durable one.
        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(None):
            if self._transactions:
                return await self._transactions.run(work, durable=durable)
            async with asyncio.timeout(self._wait_seconds), self.engine.begin() as connection:
                return await connection.run_sync(work)

    async def read_in_transaction(self, work: Callable[[Connection], T]) -> T:
        """Run a short transaction that only reads, which a request waits for; on SQLite in a thread of its own.

        Raises: StoreUnavailable: as for `begin`.
        """
        with self._outages(None, writing=False):
            async with asyncio.timeout(self._wait_seconds):
                if self._transactions:
                    return await self._transactions.read(work)
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
        self.breaker.trip(Fault.LOCKED if self.sqlite else Fault.UNREACHABLE)

    def unavailable(self) -> StoreUnavailable:
        """Return the error of who does not even try while the breaker is open."""
        return StoreUnavailable(self.breaker.fault or Fault.UNREACHABLE)

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
        advice = sqlite.ADVICE.get(fault_of(cause) if cause else Fault.UNREACHABLE) if self.sqlite else None
        return f"{reason}; {advice}" if advice else reason

    async def _check_or_upgrade(self) -> None:
        if self.path is not None:
            sqlite.create_file(self.path)
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
            await asyncio.to_thread(sqlite.copy_file, self.path, target)

    async def _refuse_damaged(self) -> None:
        """Raises: ConfigError: a page of the file is not as SQLite wrote it; keys or quotas may be wrong."""
        if found := await self.problems(quick=True):
            raise ConfigError(
                f"the database {self.name} is damaged ({found[0].splitlines()[0]}): {sqlite.ADVICE[Fault.DAMAGED]}"
            )

    async def close(self) -> None:
        if self._transactions:
            self._transactions.close()
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
