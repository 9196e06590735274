"""Decides which connections a server keeps: how many in all and of one address, and how long each step may take.

Pure decisions, without I/O: `protocol.py` reports what becomes of each connection and carries them out.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

from app.config import Settings

if sys.platform != "win32":
    import resource

WRITE_SECONDS = 15.0
WRITE_BYTES = 64 * 1024
"""A client that reads fewer bytes in this time, while more than fit into its receive buffer wait, is cut off."""
LINGER_SECONDS = 2.0
"""How long the rest of a refused request is read and discarded: a reset would destroy the answer before it is read."""
SWEEP_SECONDS = 0.5
"""Interval at which deadlines are checked; each may be exceeded by so much."""
MAX_CLOSING = 64
"""Connections that may linger, and as many that may flush their last bytes; the oldest is then cut off."""

MAX_FILES = 65_536
"""The soft limit of open files is raised to at most this."""
MAX_BACKLOG = 2048
OTHER_FILES = 128 + 2 * MAX_CLOSING
"""File descriptors kept for connections that are closing, and for worker sockets, database and logs."""
MIN_CONNECTIONS = 16

Reason = Literal["evicted", "refused", "slow_head", "slow_reader"]
"""Why the server closed a connection that its client had not finished with."""


class Rank(IntEnum):
    """How much a connection is worth; the lowest is closed first when places run out, and never a served one."""

    UNKNOWN = 0
    """It has not sent a whole request, or none with a valid key."""
    SENDING = 1
    """It is sending a body."""
    KNOWN = 2
    """It waits for the next request of a client whose last one had a valid key, or belongs to a trusted proxy."""
    SERVED = 3
    """Its request is complete and being answered."""


class Connection(Protocol):
    """A connection as the guard sees it."""

    address: str
    """The peer's address; the same for all that share one limit."""
    trusted: bool
    """Whether it comes from a trusted proxy: one address, many clients."""

    def unsent(self) -> int:
        """Return how many bytes wait to be sent."""

    def abort(self) -> None:
        """Cut it off."""

    def refuse_slow_head(self) -> None:
        """Answer that the head of a request took too long, and close."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections, and how long each may take to send a head."""

    total: int
    per_address: int
    head_seconds: float
    backlog: int = MAX_BACKLOG
    """Connections that the kernel may hold accepted before the process takes them, all at once if need be."""
    half_close_seconds: float = 0.15
    """How long a response may take to begin for a client that has ended what it sends."""

    @classmethod
    def for_files(cls, settings: Settings, files: int | None) -> "ConnectionLimits":
        """Return the configured limits, lowered to what fits into so many open files (None is unlimited)."""
        security = settings.security
        total, backlog = security.max_connections, MAX_BACKLOG
        if files is not None:
            backlog = min(backlog, max(MIN_CONNECTIONS, files // 4))
            total = min(total, max(MIN_CONNECTIONS, files - backlog - OTHER_FILES))
        per_address = min(security.max_connections_per_address, total)
        return cls(total, per_address, security.head_timeout_seconds, backlog, security.half_close_seconds)


def raise_file_limit() -> int | None:
    """Raise the soft limit of open files towards the hard one; return what it is then, None if there is none."""
    if sys.platform == "win32":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_FILES if hard == unlimited else min(hard, MAX_FILES)
    if soft != unlimited and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS refuses more than its own maximum, whatever the hard limit says
            return soft
        return wanted
    return None if soft == unlimited else soft


class _Places:
    """Connections by rank, each rank in the order in which they reached it."""

    def __init__(self) -> None:
        self._ranks: tuple[dict[Connection, None], ...] = tuple({} for _ in Rank)
        self.count = 0

    def add(self, connection: Connection, rank: Rank) -> None:
        self._ranks[rank][connection] = None
        self.count += 1

    def move(self, connection: Connection, before: Rank, after: Rank) -> None:
        del self._ranks[before][connection]
        self._ranks[after][connection] = None

    def remove(self, connection: Connection, rank: Rank) -> None:
        del self._ranks[rank][connection]
        self.count -= 1

    def least(self) -> Connection | None:
        """Return the connection to close first; None if all are served."""
        for rank in (Rank.UNKNOWN, Rank.SENDING, Rank.KNOWN):
            if self._ranks[rank]:
                return next(iter(self._ranks[rank]))
        return None


class _Deadline:
    """Connections in the order in which their time is up; each has equally long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[Connection, float] = {}

    def start(self, connection: Connection, now: float) -> None:
        """Begin to count, unless that has begun."""
        self._due.setdefault(connection, now + self._seconds)

    def stop(self, connection: Connection) -> None:
        self._due.pop(connection, None)

    def expired(self, now: float) -> Iterator[Connection]:
        """Yield those whose time is up, and forget them."""
        while self._due and next(iter(self._due.values())) <= now:
            connection = next(iter(self._due))
            del self._due[connection]
            yield connection

    def pop_oldest(self) -> Connection:
        connection = next(iter(self._due))
        del self._due[connection]
        return connection

    def __len__(self) -> int:
        return len(self._due)


class TooManyConnections(Exception):
    """There is no place for a new connection, because every other is being served."""

    def __init__(self, *, of_address: bool) -> None:
        super().__init__()
        self.of_address = of_address
        """Whether the address has too many, rather than the server."""


class ConnectionGuard:
    """Gives connections their places and enforces their deadlines.

    A new connection is never refused while another has no complete request to be answered: that one gives way, the
    oldest of the lowest rank first.  So however many connections send nothing or little, a client that sends its
    request finds a place and keeps it.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        clock: Callable[[], float],
        on_close: Callable[[Reason], None] = lambda reason: None,
    ) -> None:
        """Args: clock: seconds that never go back; on_close: is told of each connection closed by the guard."""
        self.limits = limits
        self._clock = clock
        self._on_close = on_close
        self._ranks: dict[Connection, Rank] = {}
        self._all = _Places()
        self._of_address: dict[str, _Places] = {}
        self._heads = _Deadline(limits.head_seconds)
        self._writes = _Deadline(WRITE_SECONDS)
        self._flushing = _Deadline(WRITE_SECONDS)
        self._lingering = _Deadline(LINGER_SECONDS)
        self._unsent: dict[Connection, int] = {}
        """Bytes that waited when the time for writing began."""

    @property
    def open(self) -> int:
        """Return how many connections have a place."""
        return self._all.count

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to check: no connection at all, not even one that is closing."""
        return not (self._ranks or self._flushing or self._lingering)

    def add(self, connection: Connection) -> None:
        """Give a new connection a place, if need be that of another.

        Raises: TooManyConnections: all others are being served.
        """
        neighbours = None if connection.trusted else self._of_address.get(connection.address)
        if neighbours is not None and neighbours.count >= self.limits.per_address:
            self._evict(neighbours, of_address=self._all.count < self.limits.total)
        elif self._all.count >= self.limits.total:
            self._evict(self._all, of_address=False)
        rank = Rank.KNOWN if connection.trusted else Rank.UNKNOWN
        self._ranks[connection] = rank
        if not connection.trusted:
            self._of_address.setdefault(connection.address, _Places())
        for places in self._places(connection):
            places.add(connection, rank)
        self._heads.start(connection, self._clock())

    def _evict(self, places: _Places, *, of_address: bool) -> None:
        if (least := places.least()) is None:
            self._on_close("refused")
            raise TooManyConnections(of_address=of_address)
        self._on_close("evicted")
        self.remove(least)
        least.abort()

    def _places(self, connection: Connection) -> tuple[_Places, ...]:
        return (self._all,) if connection.trusted else (self._all, self._of_address[connection.address])

    def rank(self, connection: Connection, rank: Rank) -> None:
        """Note what a connection does now."""
        if (before := self._ranks.get(connection)) is None or before is rank:
            return
        self._ranks[connection] = rank
        for places in self._places(connection):
            places.move(connection, before, rank)

    def head_begun(self, connection: Connection) -> None:
        """Start the time for a head."""
        if connection in self._ranks:
            self._heads.start(connection, self._clock())

    def head_done(self, connection: Connection) -> None:
        self._heads.stop(connection)

    def write_paused(self, connection: Connection) -> None:
        """Start the time in which the client has to read what is buffered for it; that of one which closes runs."""
        if connection in self._ranks:
            self._start_write(self._writes, connection)

    def _start_write(self, deadline: _Deadline, connection: Connection) -> None:
        deadline.start(connection, self._clock())
        self._unsent[connection] = connection.unsent()

    def write_resumed(self, connection: Connection) -> None:
        """Stop it; one that closes has its last bytes to read all the same."""
        if connection in self._ranks:
            self._writes.stop(connection)
            self._unsent.pop(connection, None)

    def closing(self, connection: Connection, *, lingers: bool) -> None:
        """Take a connection's place; it has a moment to read its answer, less if it `lingers` to discard its input."""
        self._release(connection)
        self._heads.stop(connection)
        self._writes.stop(connection)
        deadline = self._lingering if lingers else self._flushing
        if len(deadline) >= MAX_CLOSING:
            deadline.pop_oldest().abort()
        if lingers:
            deadline.start(connection, self._clock())
        else:
            self._start_write(deadline, connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection."""
        self._release(connection)
        for deadline in (self._heads, self._writes, self._flushing, self._lingering):
            deadline.stop(connection)
        self._unsent.pop(connection, None)

    def _release(self, connection: Connection) -> None:
        if (rank := self._ranks.pop(connection, None)) is None:
            return
        for places in self._places(connection):
            places.remove(connection, rank)
        if not connection.trusted and not self._of_address[connection.address].count:
            del self._of_address[connection.address]

    def sweep(self) -> None:
        """Close every connection whose time is up."""
        now = self._clock()
        for connection in self._heads.expired(now):
            self._on_close("slow_head")
            connection.refuse_slow_head()
        for deadline in (self._writes, self._flushing):
            for connection in list(deadline.expired(now)):
                if self._unsent[connection] - connection.unsent() >= WRITE_BYTES:
                    self._start_write(deadline, connection)
                    continue
                self._on_close("slow_reader")
                connection.abort()
        for connection in self._lingering.expired(now):
            connection.abort()
