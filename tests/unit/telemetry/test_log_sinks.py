"""Log sinks, and that none of them can delay or break a request."""

import io
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from app.config import LoggingConfig
from app.errors import ConfigError
from app.telemetry import configure_logging, logs
from tests.unit.telemetry.logged import dropped, logged
from tests.waiting import wait_for

WAIT_SECONDS = 20


def test_a_file_is_rotated_and_its_backups_are_limited(tmp_path: Path) -> None:
    """No file exceeds its limit, and there are no more backups than configured."""
    path = tmp_path / "logs" / "service.log"

    lines = logged(_fifty_lines, file=path, max_bytes=1000, backups=2)

    files = sorted(file.name for file in path.parent.iterdir())
    assert ["service.log", "service.log.1", "service.log.2"] == files
    assert all(file.stat().st_size <= 1000 for file in path.parent.iterdir())
    assert path.read_text().splitlines(keepends=True)[-1] == lines[-1]


def test_without_backups_the_file_starts_anew(tmp_path: Path) -> None:
    """The limit holds then as well."""
    path = tmp_path / "service.log"

    lines = logged(_fifty_lines, file=path, max_bytes=1000, backups=0)

    assert [path] == list(tmp_path.iterdir())
    assert 0 < path.stat().st_size <= 1000
    assert path.read_text().endswith(lines[-1])


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
def test_only_the_owner_may_read_the_file_and_its_backups(tmp_path: Path) -> None:
    """New ones, and those that were there with other permissions."""
    path = tmp_path / "service.log"
    for file in (path, tmp_path / "service.log.2"):
        file.write_text("before\n")
        file.chmod(0o644)

    logged(_fifty_lines, file=path, max_bytes=1000, backups=3)

    files = list(tmp_path.iterdir())
    assert 3 <= len(files)
    assert {0o600} == {file.stat().st_mode & 0o777 for file in files}


def _fifty_lines() -> None:
    for number in range(50):
        structlog.get_logger("a").info(f"line {number}")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such pipes")
def test_a_pipe_takes_lines_as_a_file_does(tmp_path: Path) -> None:
    """As /dev/stdout is one in a container."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        lines = logged(_fifty_lines, file=path, max_bytes=1000, backups=3)

        assert lines == os.read(reader, 65536).decode().splitlines(keepends=True)
        assert [path] == list(tmp_path.iterdir())
    finally:
        os.close(reader)


def test_a_file_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    """The message names the key."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(ConfigError, match=r"logging\.file: .* cannot be written"):
        configure_logging(LoggingConfig(file=tmp_path / "taken" / "service.log"))


class StalledStream(io.StringIO):
    """Blocks every write until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.reached = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.go.wait(WAIT_SECONDS)
        return super().write(text)


def test_a_stalled_sink_costs_lines_and_never_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging returns at once, what does not fit in the queue is counted, and a stop does not wait for ever."""
    monkeypatch.setattr(logs, "QUEUE_LINES", 10)
    stream, log, before = StalledStream(), structlog.get_logger("a"), dropped()
    stop = configure_logging(LoggingConfig(), stream)
    log.info("stuck")
    assert stream.reached.wait(WAIT_SECONDS)

    begin = time.monotonic()
    for number in range(100):
        log.info("line", number=number)
    logged_in = time.monotonic() - begin
    stop()
    stopped_in = time.monotonic() - begin - logged_in
    stream.go.set()

    assert 90 == dropped() - before
    assert logged_in < WAIT_SECONDS / 2
    assert stopped_in < WAIT_SECONDS / 2


class FullStream(io.StringIO):
    """A disk without room."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_counted_and_not_raised(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does it print tracebacks of its own."""
    before = dropped()
    stop = configure_logging(LoggingConfig(), FullStream())

    structlog.get_logger("a").info("lost")
    stop()

    assert 1 == dropped() - before
    assert "" == capsys.readouterr().err


def test_a_file_that_had_no_room_continues_with_whole_lines(tmp_path: Path) -> None:
    """What was cut off is ended, and what waited in a buffer is not written into a later line."""
    path, log = tmp_path / "service.log", structlog.get_logger("a")
    path.write_text('{"cut off by a kill')
    before = dropped()
    stop = configure_logging(LoggingConfig(file=path), io.StringIO())
    log.info("one")
    wait_for(lambda: '"one"' in path.read_text())
    with files_end_at(path.stat().st_size + 10):
        log.info("lost")
        wait_for(lambda: dropped() - before == 1)
    log.info("two")
    stop()

    lines = path.read_text().splitlines()
    assert 4 == len(lines)
    assert '{"cut off by a kill' == lines[0]
    assert ["one", "two"] == [json.loads(lines[number])["message"] for number in (1, 3)]
    assert len(lines[2]) == 10


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no")


def test_a_line_that_cannot_be_rendered_is_counted_and_not_raised() -> None:
    """The next line comes through."""
    before = dropped()

    def act() -> None:
        structlog.get_logger("a").info("bad", value=Unprintable())
        structlog.get_logger("a").info("good")

    assert ["good"] == [json.loads(line)["message"] for line in logged(act)]
    assert 1 == dropped() - before


def test_a_second_set_up_replaces_the_first() -> None:
    """No line appears twice."""
    first, second = io.StringIO(), io.StringIO()
    stops = [configure_logging(LoggingConfig(), first), configure_logging(LoggingConfig(), second)]

    structlog.get_logger("a").info("x")
    for stop in stops:
        stop()

    assert "" == first.getvalue()
    assert 1 == second.getvalue().count("\n")


def test_standard_error_is_where_lines_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the log is on standard output."""
    monkeypatch.setattr(sys, "stderr", error := io.StringIO())
    monkeypatch.setattr(sys, "stdout", output := io.StringIO())

    stop = configure_logging(LoggingConfig())
    structlog.get_logger("a").info("x")
    stop()

    assert 1 == error.getvalue().count("\n")
    assert "" == output.getvalue()
