"""What is wrong with a database that fails: as words for all, and as the drivers of SQLite and Postgres say it."""

import sqlite3
from enum import StrEnum


class Fault(StrEnum):
    """A reason why transactions fail; the text continues "the database ..." for clients and operators."""

    UNREACHABLE = "does not answer"
    LOCKED = "is locked by another program"
    FULL = "has no room left on its disk"
    READ_ONLY = "cannot be written"
    DAMAGED = "is damaged"
    NO_MEMORY = "has no memory left"
    REFUSED = "refuses the user or the password"

    @property
    def only_writes(self) -> bool:
        """Return whether transactions that only read succeed all the same."""
        return self in (Fault.LOCKED, Fault.FULL, Fault.READ_ONLY, Fault.NO_MEMORY)


_SQLITE = {
    sqlite3.SQLITE_BUSY: Fault.LOCKED,
    sqlite3.SQLITE_LOCKED: Fault.LOCKED,
    sqlite3.SQLITE_FULL: Fault.FULL,
    sqlite3.SQLITE_READONLY: Fault.READ_ONLY,
    sqlite3.SQLITE_CORRUPT: Fault.DAMAGED,
    sqlite3.SQLITE_NOTADB: Fault.DAMAGED,
}
_SQLITE_WRITING = frozenset(
    [
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_DIR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    ]
)
_POSTGRES = {
    "25006": Fault.READ_ONLY,  # read_only_sql_transaction: a standby
    "53100": Fault.FULL,
    "55P03": Fault.LOCKED,
    "XX001": Fault.DAMAGED,
    "XX002": Fault.DAMAGED,
}


def fault_of(error: BaseException) -> Fault:
    """Return what an error of a driver, or SQLAlchemy's around it, says of the database."""
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "sqlite_errorcode", None)
        if code in _SQLITE_WRITING:
            return Fault.READ_ONLY
        if code is not None and code & 0xFF in _SQLITE:  # the rest says more of the same kind
            return _SQLITE[code & 0xFF]
        if (state := getattr(cause, "sqlstate", None)) in _POSTGRES:
            return _POSTGRES[state]
        cause = getattr(cause, "orig", None) or cause.__cause__
    return Fault.UNREACHABLE
