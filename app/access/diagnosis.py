"""Examines a database for the operator, without changing what it holds."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import Connection, func, literal_column, select, text

from app.access import tables
from app.access.database import Database, head_revision
from app.access.faults import Fault
from app.errors import StoreUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The state of a database at one moment."""

    fault: Fault | None = None
    """Why it can be neither read nor written, or only read."""
    reason: str = ""
    """The same in the driver's words, and what may help."""
    readable: bool = False
    revision: str | None = None
    damage: list[str] = field(default_factory=list)
    """What SQLite finds wrong with its file."""
    newest_row: datetime | None = None
    """The latest moment in any table, UTC."""
    clock_skew_seconds: float = 0.0
    """How far Postgres' clock is ahead of this machine's."""
    encrypted: bool = True
    """Whether the connection to Postgres is; True for SQLite."""
    standby: bool = False
    """Whether Postgres only follows another server."""

    @property
    def newer(self) -> bool:
        """Return whether the schema is one that this program does not know."""
        return self.revision is not None and self.revision > head_revision()


async def diagnose(database: Database) -> Diagnosis:
    """Examine a database that exists; whatever is wrong with it is in the result, and not raised."""
    found: dict[str, object] = {}
    try:
        found |= {"revision": await database.revision(), "readable": True}
        found |= {"damage": await database.problems()}
        async with database.read() as connection:
            if not database.sqlite:
                found |= await connection.run_sync(_of_postgres)
            if found["revision"] == head_revision():
                found |= {"newest_row": await connection.run_sync(_newest_row)}
        if found["revision"] is not None:
            # Says whether somebody else holds it, it may not be written, or has no room.
            await database.write_nothing_new()
    except StoreUnavailable as error:
        found |= {"fault": database.breaker.fault or Fault.UNREACHABLE, "reason": database.reason_of(error)}
    return Diagnosis(**found)  # type: ignore[arg-type]  # by the names above


def _of_postgres(connection: Connection) -> dict[str, object]:
    now = connection.scalar(select(literal_column("clock_timestamp()"))) or datetime.now(UTC)
    encrypted = connection.scalar(text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"))
    return {
        "clock_skew_seconds": (now - datetime.now(UTC)).total_seconds(),
        "encrypted": bool(encrypted),
        "standby": bool(connection.scalar(text("SELECT pg_is_in_recovery()"))),
    }


def _newest_row(connection: Connection) -> datetime | None:
    columns = tables.inference_log.c.created, tables.api_keys.c.created
    moments = [connection.scalar(select(func.max(column))) for column in columns]
    return max((moment for moment in moments if moment is not None), default=None)
