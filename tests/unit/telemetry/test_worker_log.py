"""What a worker writes on its standard error is in the log of the service, under its own name and level."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from app.config import LoggingConfig
from app.ipc.interpreter import Interpreter
from app.ipc.private_folder import PrivateFolder
from app.ipc.worker_log import MAX_LINE_BYTES, RecordFormatter, log_line, relay_lines
from app.telemetry import configure_logging
from tests.unit.telemetry.logged import logged


def fields(act: Callable[[], object], **config: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(act, **config)]


def record(level: int, name: str, message: str, *values: object, error: BaseException | None = None) -> bytes:
    """Return a line as a worker writes it."""
    about = (type(error), error, error.__traceback__) if error is not None else None
    return RecordFormatter().format(logging.LogRecord(name, level, "", 0, message, values, about)).encode()


def test_a_record_keeps_its_level_logger_and_message() -> None:
    [line] = fields(lambda: log_line(record(logging.ERROR, "app.worker.process", "a step of %d", 3), 7))

    assert ("ERROR", "app.worker.process", "a step of 3", 7) == (
        line["level"],
        line["logger"],
        line["message"],
        line["worker_pid"],
    )


def test_a_traceback_is_a_field_of_its_line() -> None:
    """Many lines of the worker are one of the log."""
    try:
        raise ValueError("one\ntwo")
    except ValueError as error:
        line = record(logging.ERROR, "app.worker", "failed", error=error)

    [shown] = fields(lambda: log_line(line, 7))

    assert b"\n" not in line
    assert shown["exception"].endswith("ValueError: one\ntwo")


def test_other_text_is_a_warning_and_nothing_is_nothing() -> None:
    def act() -> None:
        for each in (b"terminate called", b"  \r", b'\x1e["cut', b"\xff"):
            log_line(each, 7)

    lines = fields(act)

    assert [("WARNING", "app.worker")] * 3 == [(line["level"], line["logger"]) for line in lines]
    assert ["terminate called", '\x1e["cut', "\ufffd"] == [line["message"] for line in lines]


def test_levels_of_the_service_hold_for_its_workers() -> None:
    warning = record(logging.WARNING, "torch.something", "noise")

    assert [] == fields(lambda: log_line(warning, 7), levels={"torch": "ERROR"})


async def test_a_line_without_end_takes_no_memory() -> None:
    stream, reader = io.StringIO(), asyncio.StreamReader()
    stop = configure_logging(LoggingConfig(), stream)
    reader.feed_data(b"x" * 10 * MAX_LINE_BYTES + b"\nnext")
    reader.feed_eof()

    await relay_lines(reader, 7)
    stop()

    assert [MAX_LINE_BYTES, 4] == [len(json.loads(line)["message"]) for line in stream.getvalue().splitlines()]


async def test_the_last_words_of_a_process_that_dies_are_logged() -> None:
    stream = io.StringIO()
    stop = configure_logging(LoggingConfig(), stream)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; sys.stderr.write('last words'); sys.stderr.flush(); sys.exit(3)"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    interpreter = Interpreter(PrivateFolder(), process)

    assert 3 == await interpreter.wait()
    await interpreter.stop(1)
    stop()

    assert ["last words"] == [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
