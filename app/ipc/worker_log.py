"""Carries what a worker process writes on its standard error into the log of the service.

A line of the worker's own logging is a record as JSON behind a separator; whatever else appears there, as of a library
in C++ or an interpreter that dies, is a line of text.
"""

import asyncio
import json
import logging

import structlog

_RECORD = "\x1e"
"""Begins a record; no text that a library prints begins so."""
MAX_LINE_BYTES = 16_384
"""Of a line more is not read: what a library prints may be a whole tensor."""
_TEXT_LOGGER = "app.worker"


class RecordFormatter(logging.Formatter):
    """Writes a record of the worker as one line that the service understands."""

    def format(self, record: logging.LogRecord) -> str:
        error = self.formatException(record.exc_info) if record.exc_info else None
        return _RECORD + json.dumps([record.levelno, record.name, record.getMessage(), error])


async def relay_lines(stream: asyncio.StreamReader, pid: int) -> None:
    """Log each line of a worker until it closes the stream.  Args: pid: of the worker."""
    line = bytearray()
    while part := await stream.read(MAX_LINE_BYTES):
        *ended, rest = part.split(b"\n")
        for each in ended:
            line += each[: MAX_LINE_BYTES - len(line)]
            log_line(bytes(line), pid)
            line.clear()
        line += rest[: MAX_LINE_BYTES - len(line)]
    log_line(bytes(line), pid)


def log_line(line: bytes, pid: int) -> None:
    """Log what stands on one line: a record under its own name and level, a text as a warning."""
    text = line.decode(errors="replace").rstrip()
    if not text:
        return
    if text.startswith(_RECORD):
        try:
            level, name, message, error = json.loads(text[len(_RECORD) :])
        except ValueError:  # one that was cut off
            pass
        else:
            more = {"exception": error} if error else {}
            structlog.get_logger(str(name)).log(int(level), str(message), worker_pid=pid, **more)
            return
    structlog.get_logger(_TEXT_LOGGER).warning(text, worker_pid=pid)
