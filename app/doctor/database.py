"""Examines the database: whether it is there, whole, up to date and writable, and who holds it if it is not."""

import os
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from app.access.database import Database, head_revision
from app.access.diagnosis import Diagnosis, diagnose
from app.access.faults import Fault
from app.config import Settings
from app.doctor.findings import Finding, megabytes, ok, problem, warning
from app.doctor.network import is_local
from app.doctor.storage import free_space
from app.errors import ConfigError

SUBJECT = "database"
MAX_SKEW = timedelta(minutes=5)


async def examine_database(settings: Settings) -> list[Finding]:
    """Return what there is to say of the configured database; one that does not exist is not created."""
    try:
        database = Database(settings.where_database)
    except ConfigError as error:
        return [problem(SUBJECT, str(error), "docs/operations.md shows both forms")]
    try:
        if not database.exists():
            return [ok(SUBJECT, f"the first start creates {database.where}")]
        found = await diagnose(database)
        space = _free_space(database.path, settings.app.data_dir)
        return [*_state(database, found), *space, *_schema(found), *_clock(found), *_connection(database, found)]
    finally:
        await database.close()


def _state(database: Database, found: Diagnosis) -> Iterator[Finding]:
    size = f", {megabytes(database.size())}" if database.sqlite else ""
    if found.damage:
        advice = "stop the service and restore a copy; `sqlite3 FILE .recover` saves what can be read"
        yield problem(SUBJECT, f"{database.where} is damaged: {found.damage[0].splitlines()[0]}", advice)
    elif found.fault is None:
        yield ok(SUBJECT, f"{database.where} answers, is whole and can be written{size}")
    else:
        holders = _holders(database.path) if found.fault is Fault.LOCKED and database.path else ""
        text = f"{database.where} {found.fault}{holders}"
        yield problem(SUBJECT, text, found.reason or "see that it runs and can be reached")
    if database.path is not None:
        yield from _file(database.path)


def _free_space(path: Path | None, data_dir: Path) -> Iterator[Finding]:
    """Yield the room on the disk of SQLite's file, where it is not the data folder's, which is examined anyhow."""
    if path is not None and path.parent.resolve() != data_dir.resolve():
        yield from free_space(SUBJECT, path.parent)


def _file(path: Path) -> Iterator[Finding]:
    mode = path.stat().st_mode
    if os.name == "posix" and mode & 0o077:
        yield warning(SUBJECT, f"others on this machine can read {path}", f"chmod 600 {path}")
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size > 256_000_000:
        text = f"its write-ahead log has {megabytes(log.stat().st_size)}"
        yield warning(SUBJECT, text, "a program that reads for very long keeps it from being emptied; end that program")
    if sqlite3.sqlite_version_info < (3, 35):
        yield problem(SUBJECT, f"SQLite {sqlite3.sqlite_version} is too old", "use a Python with SQLite 3.35 or newer")


def _schema(found: Diagnosis) -> Iterator[Finding]:
    if not found.readable:
        return
    if found.newer:
        text = f"its schema {found.revision} is newer than this program's {head_revision()}"
        yield problem(SUBJECT, text, "install the version that made it")
    elif found.revision != head_revision():
        yield ok(SUBJECT, f"the next start brings its schema from {found.revision or 'nothing'} to {head_revision()}")
    else:
        yield ok(SUBJECT, f"its schema {found.revision} is this program's")


def _clock(found: Diagnosis) -> Iterator[Finding]:
    ahead = found.newest_row - datetime.now(UTC) if found.newest_row else timedelta()
    if ahead > MAX_SKEW:
        text = f"its newest row is {ahead} ahead of this machine's clock"
        yield warning("clock", text, "set the clock; quotas and expiries go by it")
    if abs(found.clock_skew_seconds) > MAX_SKEW.total_seconds():
        text = f"the database's clock is {found.clock_skew_seconds:.0f} s away from this machine's"
        yield warning("clock", text, "set both by NTP; quotas and expiries go by them")


def _connection(database: Database, found: Diagnosis) -> Iterator[Finding]:
    if database.sqlite or not found.readable:
        return
    if found.standby:
        yield problem(SUBJECT, "it is a standby, which only follows another server", "name the primary in DATABASE_URL")
    if not found.encrypted and not is_local(database.host):
        advice = "add ?sslmode=verify-full to DATABASE_URL"
        yield warning(SUBJECT, f"the connection to {database.host} is not encrypted", advice)


def _holders(path: Path) -> str:
    """Name the other processes that have the file open, where the system says so (Linux)."""
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = {entry.readlink() for entry in (process / "fd").iterdir()}
            name = (process / "comm").read_text().strip()
        except OSError:
            continue
        if path.resolve() in files and process.name != str(os.getpid()):
            holders.append(f"{name} (process {process.name})")
    return f", opened by {', '.join(sorted(holders))}" if holders else ""
