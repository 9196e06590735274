"""What the errors of drivers say of a database."""

import sqlite3

import pytest
from sqlalchemy.exc import DBAPIError

from app.access.faults import Fault, fault_of


def of_sqlite(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("canary")
    error.sqlite_errorcode = code
    return error


class PostgresError(Exception):
    """As asyncpg's."""

    def __init__(self, state: str) -> None:
        super().__init__("canary")
        self.sqlstate = state


def caused_by(cause: Exception) -> Exception:
    error = OSError("something else")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (of_sqlite(sqlite3.SQLITE_FULL), Fault.FULL),
        (of_sqlite(sqlite3.SQLITE_BUSY_SNAPSHOT), Fault.LOCKED),
        (of_sqlite(sqlite3.SQLITE_READONLY_DBMOVED), Fault.READ_ONLY),
        (of_sqlite(sqlite3.SQLITE_IOERR_WRITE), Fault.READ_ONLY),
        (of_sqlite(sqlite3.SQLITE_IOERR_READ), Fault.UNREACHABLE),
        (of_sqlite(sqlite3.SQLITE_CORRUPT_INDEX), Fault.DAMAGED),
        (of_sqlite(sqlite3.SQLITE_NOTADB), Fault.DAMAGED),
        (PostgresError("53100"), Fault.FULL),
        (PostgresError("25006"), Fault.READ_ONLY),
        (PostgresError("57P01"), Fault.UNREACHABLE),
        (TimeoutError(), Fault.UNREACHABLE),
    ],
)
def test_a_fault_is_known_by_the_drivers_code_however_it_is_wrapped(error: Exception, fault: Fault):
    assert fault == fault_of(error)
    assert fault == fault_of(DBAPIError("SELECT 1", None, error))
    assert fault == fault_of(caused_by(error))


def test_readers_go_on_where_only_writing_fails():
    assert {Fault.FULL, Fault.LOCKED, Fault.READ_ONLY, Fault.NO_MEMORY} == {
        fault for fault in Fault if fault.only_writes
    }
