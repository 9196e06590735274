"""Which connections get a place, which give theirs up, and when each is closed.  No socket: a clock and a list."""

import resource
from dataclasses import dataclass, field

import pytest

from app.config import Settings, load_settings
from app.web.http.connections import (
    LINGER_SECONDS,
    MAX_CLOSING,
    MIN_CONNECTIONS,
    WRITE_BYTES,
    WRITE_SECONDS,
    ConnectionGuard,
    ConnectionLimits,
    Rank,
    TooManyConnections,
    raise_file_limit,
)


@dataclass(eq=False)
class FakeConnection:
    """Remembers what was done to it."""

    address: str = "a"
    trusted: bool = False
    waiting: int = 0
    fate: list[str] = field(default_factory=list)

    def unsent(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.fate.append("aborted")

    def refuse_slow_head(self) -> None:
        self.fate.append("408")


@dataclass
class Bench:
    """A guard with small limits, a clock that the test sets, and what the guard reported."""

    total: int = 4
    per_address: int = 4
    now: float = 0.0
    closed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = ConnectionLimits(self.total, self.per_address, head_seconds=10)
        self.guard = ConnectionGuard(limits, clock=lambda: self.now, on_close=self.closed.append)

    def add(self, rank: Rank = Rank.UNKNOWN, address: str = "a", *, trusted: bool = False) -> FakeConnection:
        connection = FakeConnection(address, trusted)
        self.guard.add(connection)
        if rank is not Rank.UNKNOWN:
            self.guard.head_done(connection)
            self.guard.rank(connection, rank)
        return connection

    def sweep(self, after: float) -> None:
        self.now += after
        self.guard.sweep()


def test_the_oldest_connection_without_a_request_gives_way():
    bench = Bench(total=3)
    served, first, second = bench.add(Rank.SERVED), bench.add(), bench.add()

    new = bench.add()

    assert ([], ["aborted"], [], []) == (served.fate, first.fate, second.fate, new.fate)
    assert 3 == bench.guard.open
    assert ["evicted"] == bench.closed


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [
        ((Rank.SERVED, Rank.KNOWN, Rank.SENDING, Rank.UNKNOWN), 3),
        ((Rank.SERVED, Rank.KNOWN, Rank.SENDING, Rank.SENDING), 2),
        ((Rank.SERVED, Rank.KNOWN, Rank.KNOWN, Rank.SERVED), 1),
    ],
)
def test_a_client_that_is_through_keeps_its_place_before_others(ranks, victim):
    bench = Bench()
    connections = [bench.add(rank) for rank in ranks]

    bench.add()

    assert [["aborted"] if number == victim else [] for number in range(4)] == [each.fate for each in connections]


def test_a_served_connection_is_never_closed_for_a_new_one():
    bench = Bench(total=2)
    served = [bench.add(Rank.SERVED) for _ in range(2)]

    with pytest.raises(TooManyConnections) as refused:
        bench.add()

    assert not refused.value.of_address
    assert [[], []] == [each.fate for each in served]
    assert ["refused"] == bench.closed


def test_an_address_that_has_too_many_gives_up_its_own():
    bench = Bench(total=10, per_address=2)
    other, first, _ = bench.add(address="b"), bench.add(), bench.add()

    bench.add()

    assert ([], ["aborted"]) == (other.fate, first.fate)


def test_an_address_whose_connections_are_all_served_is_refused_and_others_are_not():
    bench = Bench(total=10, per_address=2)
    for _ in range(2):
        bench.add(Rank.SERVED)

    with pytest.raises(TooManyConnections) as refused:
        bench.add()
    bench.add(address="b")

    assert refused.value.of_address


def test_a_trusted_proxy_has_as_many_connections_as_there_are_places():
    """All its clients come from one address."""
    bench = Bench(total=5, per_address=1)

    proxied = [bench.add(address="proxy", trusted=True) for _ in range(5)]

    assert [[]] * 5 == [each.fate for each in proxied]
    stranger = bench.add(address="b")
    assert ["aborted"] == proxied[0].fate
    assert [] == stranger.fate


def test_a_place_is_free_once_its_connection_is_gone():
    bench = Bench(total=2, per_address=2)
    for _ in range(1000):
        connection = bench.add(Rank.SERVED)
        bench.guard.remove(connection)
    bench.add(Rank.SERVED)
    bench.add(Rank.SERVED)

    assert 2 == bench.guard.open
    assert [] == bench.closed


def test_a_refused_connection_leaves_no_trace():
    bench = Bench(total=1)
    served = bench.add(Rank.SERVED)
    for number in range(100):
        with pytest.raises(TooManyConnections):
            bench.add(address=str(number))
    bench.guard.remove(served)

    assert bench.guard.idle
    assert 0 == bench.guard.open


def test_a_head_has_its_time_from_the_connection_on():
    bench = Bench()
    slow, quick = bench.add(), bench.add()
    bench.guard.head_done(quick)

    bench.sweep(9.9)
    before = list(slow.fate)
    bench.sweep(0.2)

    assert ([], ["408"], []) == (before, slow.fate, quick.fate)
    assert ["slow_head"] == bench.closed


def test_a_byte_now_and_then_gives_a_head_no_more_time():
    bench = Bench()
    slow = bench.add()
    for _ in range(4):
        bench.guard.head_begun(slow)
        bench.sweep(3)

    assert ["408"] == slow.fate


def test_a_client_that_reads_nothing_is_cut_off():
    bench = Bench()
    stalled, reading = bench.add(Rank.SERVED), bench.add(Rank.SERVED)
    for _ in range(3):
        bench.guard.write_paused(stalled)
        bench.guard.write_paused(reading)
        bench.sweep(WRITE_SECONDS / 2)
        bench.guard.write_resumed(reading)

    assert (["aborted"], []) == (stalled.fate, reading.fate)
    assert ["slow_reader"] == bench.closed


@pytest.mark.parametrize("closing", [False, True], ids=["open", "closing"])
def test_a_client_that_reads_slowly_keeps_its_connection_as_long_as_it_reads_enough(closing):
    """However large the response: the time is for so many bytes of it, not for all."""
    bench = Bench()
    slow = bench.add(Rank.SERVED)
    slow.waiting = 10 * WRITE_BYTES
    if closing:
        bench.guard.closing(slow, lingers=False)
    else:
        bench.guard.write_paused(slow)
    for _ in range(9):
        slow.waiting -= WRITE_BYTES
        bench.sweep(WRITE_SECONDS)
    reading = list(slow.fate)
    slow.waiting -= WRITE_BYTES - 1
    bench.sweep(WRITE_SECONDS)

    assert ([], ["aborted"]) == (reading, slow.fate)


def test_a_client_that_stops_reading_the_end_of_its_last_response_is_cut_off():
    """Also after it has read so much that the transport would take more to write."""
    bench = Bench()
    slow = bench.add(Rank.SERVED)
    slow.waiting = 2 * WRITE_BYTES
    bench.guard.write_paused(slow)
    bench.guard.closing(slow, lingers=False)
    slow.waiting = WRITE_BYTES // 4
    bench.guard.write_resumed(slow)
    bench.sweep(WRITE_SECONDS)
    bench.sweep(WRITE_SECONDS)

    assert ["aborted"] == slow.fate
    assert bench.guard.idle


def test_a_connection_that_closes_gives_its_place_up_at_once_and_goes_in_a_moment():
    bench = Bench(total=1)
    closing = bench.add(Rank.SERVED)
    bench.guard.closing(closing, lingers=True)
    bench.add(Rank.SERVED)

    bench.sweep(LINGER_SECONDS)

    assert ["aborted"] == closing.fate


def test_the_connections_that_are_closing_are_bounded_too():
    bench = Bench()
    closing = []
    for _ in range(MAX_CLOSING + 3):
        closing.append(bench.add(Rank.SERVED))
        bench.guard.closing(closing[-1], lingers=True)

    assert [["aborted"]] * 3 + [[]] * MAX_CLOSING == [each.fate for each in closing]


def test_what_is_forgotten_is_forgotten_everywhere():
    bench = Bench()
    connection = bench.add()
    bench.guard.write_paused(connection)
    bench.guard.remove(connection)
    bench.guard.rank(connection, Rank.SERVED)
    bench.guard.head_begun(connection)

    bench.sweep(100)

    assert [] == connection.fate
    assert bench.guard.idle


def limits(files: int | None, **security: int) -> ConnectionLimits:
    settings: Settings = load_settings("absent.yml", None, security=security)
    return ConnectionLimits.for_files(settings, files)


@pytest.mark.parametrize("files", [256, 1024, 4096, 65_536])
def test_files_are_left_for_everything_else_and_for_what_the_kernel_accepted(files):
    found = limits(files, max_connections=100_000)

    assert found.total + found.backlog <= files - 128 or found.total == MIN_CONNECTIONS
    assert found.total >= MIN_CONNECTIONS


def test_enough_files_leave_the_configured_limits():
    assert (4096, 512) == (limits(65_536).total, limits(None).per_address)
    assert (100, 100) == (limits(65_536, max_connections=100).total, limits(None, max_connections=100).per_address)


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = min(1024, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        raised = raise_file_limit()
        now = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    assert raised == now[0] == min(before[1], 65_536)
    assert before[1] == now[1]
