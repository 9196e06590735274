"""Configures logging: the format of a line, its sinks, and a queue between them so that no request waits for a sink.

Also switches off the tracing and telemetry of libraries.  Modules log with structlog or the standard library; the entry
point of the process calls `configure_logging` once.
"""

import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from io import BufferedWriter, FileIO, TextIOWrapper
from logging.handlers import QueueHandler, RotatingFileHandler
from pathlib import Path
from typing import Literal, TextIO

import structlog
from prometheus_client import Counter
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from app.config import LoggingConfig
from app.config.telemetry import OWN_LOGGERS
from app.errors import ConfigError

QUEUE_LINES = 10_000
"""Lines that may wait for a slow sink; further ones are dropped and counted."""
WRITE_SECONDS = 0.05
"""How often the writer thread looks for lines."""
STOP_SECONDS = 2.0
"""How long a stop waits for a sink to write the queued lines."""

UVICORN_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
QUIET_LOGGERS = [
    *("alembic", "httpcore", "httpx", "huggingface_hub", "langchain", "langchain_core"),
    *("langsmith", "sse_starlette", "transformers", "urllib3"),
]
"""Libraries whose lines below WARNING contain prompts, completions or addresses, or are of no use to an operator."""
SECRETIVE_LOGGERS = ("opentelemetry.trace.span", "slowapi")
"""Libraries whose warnings print what clients send: a header that is no trace, the key that a limit is counted by."""

dropped_lines = Counter("log_lines_dropped", "Log lines lost to a full queue or a failing sink", registry=None)
"""One counter for the process, as the standard library's loggers are; every `Metrics` exports it."""


class _Lossy(logging.Handler):
    """Counts lines that cannot be rendered, queued or written; the standard handlers print a traceback instead."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        dropped_lines.inc()


class _Lines(deque[logging.LogRecord]):
    """Lines that wait to be written.  Adding one wakes no thread: that would cost a request more than its line."""

    def put_nowait(self, line: logging.LogRecord) -> None:
        """Raises: queue.Full: so many lines wait that this one is dropped."""
        if len(self) >= QUEUE_LINES:
            raise queue.Full
        self.append(line)


class _QueueSink(_Lossy, QueueHandler):
    """Renders a line in the caller's context and queues it for the writer thread."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Refuse what a library says below INFO, whatever level the library gives its own loggers.

        Drivers print statements with their values there, and clients the bodies that they send.
        """
        if record.levelno < logging.INFO and record.name.partition(".")[0] not in OWN_LOGGERS:
            return False
        return bool(super().filter(record))


class _StreamSink(_Lossy, logging.StreamHandler[TextIO]):
    """Standard error, or another stream."""


class _FileSink(_Lossy, RotatingFileHandler):
    """A file that is rotated when it is full, and that only its owner may read.

    A full disk costs lines and spoils none that come after.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        super().handleError(record)
        # What is buffered would be written later, in the middle of another line.  The next line opens the file again.
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(OSError):
                stream.close()

    def _open(self) -> TextIOWrapper:
        """Open the file, and end the line that a full disk or a killed process has cut off."""
        file = FileIO(self.baseFilename, self.mode, opener=_open_closed)
        stream = TextIOWrapper(BufferedWriter(file), encoding=self.encoding, errors=self.errors)
        if not Path(self.baseFilename).is_file():  # a pipe or a terminal, such as /dev/stdout
            return stream
        with Path(self.baseFilename).open("rb") as written:
            if size := written.seek(0, os.SEEK_END):
                written.seek(size - 1)
                if written.read(1) != b"\n":
                    stream.write("\n")
        return stream

    def doRollover(self) -> None:  # noqa: N802 - the standard library's name
        super().doRollover()
        if self.stream and not self.backupCount:
            # Without backups the base class never empties the file.
            self.stream.truncate(0)


def _open_closed(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _close_to_others(path: Path) -> None:
    """Take a log file and its backups from everybody but their owner."""
    for file in (path, *path.parent.glob(f"{path.name}.*")):
        # Windows has no such bits; a pipe or a device is not ours to change.
        if os.name == "posix" and file.is_file() and file.stat().st_mode & 0o077:
            file.chmod(0o600)


def _write_lines(lines: _Lines, stopping: threading.Event, sinks: Iterable[logging.Handler]) -> None:
    stopped = False
    while not stopped:
        stopped = stopping.wait(WRITE_SECONDS)
        while lines:
            line = lines.popleft()
            for sink in sinks:
                sink.handle(line)


def configure_logging(config: LoggingConfig, stream: TextIO | None = None) -> Callable[[], None]:
    """Write every log line of the process, from structlog and the standard library alike, in one format to the sinks.

    A request renders its line and queues it; a thread writes it.  A sink that blocks or a full disk loses lines (they
    are counted) and delays no request.

    Args: stream: where lines are written besides the file; standard error when None.
    Returns: a function that writes the queued lines, waiting at most `STOP_SECONDS`, and removes the sinks.
    Raises: ConfigError: the file cannot be written.
    """
    file = _open_file(config)
    stream = stream or sys.stderr
    sinks = [_StreamSink(stream), *([file] if file else [])]
    lines, stopping = _Lines(), threading.Event()
    # Not logging's QueueListener, whose stop() waits for a stalled sink for ever.
    writer = threading.Thread(target=_write_lines, args=(lines, stopping, sinks), name="log-writer", daemon=True)
    writer.start()
    handler = _QueueSink(lines)  # type: ignore[arg-type]  # of a queue only put_nowait is called
    # A file is read by programs, and both sinks write the same lines.
    for_people = stream.isatty() and file is None
    handler.setFormatter(
        _formatter(("console" if for_people else "json") if config.format == "auto" else config.format)
    )
    root = logging.getLogger()
    level_before = root.level
    _install(root, handler, config)

    def stop() -> None:
        root.removeHandler(handler)
        root.setLevel(level_before)
        for name in (*OWN_LOGGERS, *config.levels):
            logging.getLogger(name).setLevel(logging.NOTSET)
        stopping.set()
        writer.join(STOP_SECONDS)
        # Closing a file that is still being written would wait for it.
        if file and not writer.is_alive():
            file.close()

    return stop


def _open_file(config: LoggingConfig) -> _FileSink | None:
    if config.file is None:
        return None
    try:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        _close_to_others(config.file)
        return _FileSink(config.file, maxBytes=config.max_bytes, backupCount=config.backups, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration: logging.file: {config.file} cannot be written: {error.strerror}") from None


def _formatter(line_format: Literal["json", "console"]) -> ProcessorFormatter:
    # json escapes all but printable ASCII by default.
    as_json: list[Processor] = [structlog.processors.JSONRenderer(default=repr, skipkeys=True)]
    as_text = [
        _escape_for_terminal,
        structlog.dev.ConsoleRenderer(
            colors=False, sort_keys=False, event_key="message", pad_event_to=0, pad_level=False
        ),
    ]
    return ProcessorFormatter(
        foreign_pre_chain=[structlog.contextvars.merge_contextvars],
        processors=[
            structlog.processors.format_exc_info,  # the plain traceback: no local variables, so no prompts
            structlog.processors.EventRenamer("message"),
            _header_first,
            ProcessorFormatter.remove_processors_meta,
            *(as_json if line_format == "json" else as_text),
        ],
    )


def _install(root: logging.Logger, handler: _QueueSink, config: LoggingConfig) -> None:
    level = config.level
    for former in [each for each in root.handlers if isinstance(each, _QueueSink)]:
        root.removeHandler(former)
    root.addHandler(handler)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)
    # A library asks for its level before it builds a line; none is built that the sink would refuse.
    root.setLevel(max(logging.getLevelNamesMapping()[level], logging.INFO))
    logging.raiseExceptions = False
    # No line shows them, and finding them out takes a third of the time of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    _tame_libraries(root.level)
    for name, own in config.levels.items():
        logging.getLogger(name).setLevel(own)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _tame_libraries(level: int) -> None:
    """Remove handlers that libraries install, and log noisy libraries from WARNING on."""
    for name in (*UVICORN_LOGGERS, "transformers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        # The access log would print query strings; the service writes its own.
        logger.propagate = name != "uvicorn.access"
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in SECRETIVE_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _header_first(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Put the fields that every line has in front; a value of the same name cannot replace them."""
    record: logging.LogRecord = event["_record"]
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    header = {"timestamp": moment.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name}
    return {**header, "message": event["message"], **{key: event[key] for key in event if key not in header}}


def _escape_for_terminal(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Escape what could begin a line or steer a terminal, which structlog's console renderer writes as it is."""
    tracebacks = {key: event.pop(key) for key in ("stack", "exception") if key in event}
    texts = {
        _escaped(str(key)): _escaped(value if isinstance(value, str) else repr(value)) for key, value in event.items()
    }
    # The bar shows that a line break inside an exception's message does not begin another log line.
    blocks = {
        key: "\n".join(f"    | {_escaped(line)}" for line in str(text).splitlines()) for key, text in tracebacks.items()
    }
    return texts | blocks


def _escaped(text: str) -> str:
    # Not printable: control characters, line separators, bidirectional formatting, and lone surrogates.
    return text if text.isprintable() else repr(text)[1:-1]


def disable_foreign_tracing(allow_langsmith: bool) -> None:
    """Stop libraries from sending texts or usage figures to their vendors; call it before they are imported.

    Args: allow_langsmith: leave LangSmith's own variables as they are.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if allow_langsmith:
        return
    for namespace in ("LANGSMITH", "LANGCHAIN"):
        for name in ("TRACING", "TRACING_V2"):
            os.environ[f"{namespace}_{name}"] = "false"
    langsmith = sys.modules.get("langsmith.utils")
    if langsmith is not None:  # It caches what it read from the environment.
        langsmith.get_env_var.cache_clear()
