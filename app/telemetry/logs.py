"""How a log line looks, where it goes, and that it can never hold up or break a request.

Also keeps libraries from telling others what happens here.  Knows no route and no engine; whoever logs calls structlog
or the standard library, and whoever starts the process calls `configure_logging` once.
"""

import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from logging.handlers import QueueHandler, RotatingFileHandler
from typing import TextIO

import structlog
from prometheus_client import Counter
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, WrappedLogger

from app.config import LoggingConfig
from app.errors import ConfigError

QUEUE_LINES = 10_000
"""Lines that may wait for a slow sink; one more is dropped and counted."""
STOP_SECONDS = 2.0
"""How long a stop waits for a sink to take what is left."""

_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_QUIET = [
    *("alembic", "httpcore", "httpx", "huggingface_hub", "langchain", "langchain_core"),
    *("langsmith", "sse_starlette", "transformers", "urllib3"),
]
"""Libraries whose lines below WARNING tell of prompts, answers or addresses, or of nothing that anybody asked."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, line and paragraph separators, text-direction marks, and half characters that no encoding can write."""
_BARE = re.compile(r"[^\s\"'=]+")

dropped_lines = Counter("log_lines_dropped", "Log lines lost to a full queue or a failing sink", registry=None)
"""One for the process, as the standard library's loggers are; every `Metrics` shows it."""


class _Lossy(logging.Handler):
    """A handler that counts a line it cannot take, where others would print a traceback of their own."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the standard library's name
        dropped_lines.inc()


class _QueueSink(_Lossy, QueueHandler):
    """Renders a line at once, while its context is there, and leaves the writing to the pump."""


class _StreamSink(_Lossy, logging.StreamHandler[TextIO]):
    """Standard error, or another stream."""


class _FileSink(_Lossy, RotatingFileHandler):
    """A file that starts anew when it is full."""

    def doRollover(self) -> None:  # noqa: N802 - the standard library's name
        super().doRollover()
        if self.stream and not self.backupCount:
            # The base class would go on appending to the same file for ever.
            self.stream.truncate(0)


def _pump(lines: "queue.Queue[logging.LogRecord | None]", sinks: Iterable[logging.Handler]) -> None:
    while (line := lines.get()) is not None:
        for sink in sinks:
            sink.handle(line)


def configure_logging(config: LoggingConfig, stream: TextIO | None = None) -> Callable[[], None]:
    """Send every log line of the process, structlog's and the standard library's, through one format to the sinks.

    A request only renders its line; a thread writes it, so a sink that blocks or a full disk costs lines (they are
    counted) and never a request.

    Args: stream: where lines go besides the file; standard error when None.
    Returns: a function that writes what is left, waiting at most `STOP_SECONDS`, and takes the sinks away.
    Raises: ConfigError: the file cannot be written.
    """
    file = _open_file(config)
    sinks = [_StreamSink(stream or sys.stderr), *([file] if file else [])]
    lines: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUE_LINES)
    # A thread of our own: QueueListener.stop() would wait for a stalled sink for ever.
    pump = threading.Thread(target=_pump, args=(lines, sinks), name="log-pump", daemon=True)
    pump.start()
    handler = _QueueSink(lines)
    handler.setFormatter(_formatter(config))
    root = logging.getLogger()
    level_before = root.level
    _install(root, handler, config.level)

    def stop() -> None:
        root.removeHandler(handler)
        root.setLevel(level_before)
        try:
            lines.put(None, timeout=STOP_SECONDS)
        except queue.Full:
            return
        pump.join(STOP_SECONDS)
        # Closing a file that is still being written would wait for it.
        if file and not pump.is_alive():
            file.close()

    return stop


def _open_file(config: LoggingConfig) -> _FileSink | None:
    if config.file is None:
        return None
    try:
        config.file.parent.mkdir(parents=True, exist_ok=True)
        return _FileSink(config.file, maxBytes=config.max_bytes, backupCount=config.backups, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration: logging.file: {config.file} cannot be written: {error.strerror}") from None


def _formatter(config: LoggingConfig) -> ProcessorFormatter:
    return ProcessorFormatter(
        foreign_pre_chain=[structlog.contextvars.merge_contextvars],
        processors=[
            structlog.processors.format_exc_info,  # the plain traceback: no local variables, so no prompts
            _arrange,
            _json_line if config.format == "json" else _console_line,
        ],
    )


def _install(root: logging.Logger, handler: _QueueSink, level: str) -> None:
    for former in [each for each in root.handlers if isinstance(each, _QueueSink)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = False
    _tame_libraries(root.level)
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
    """Route the lines of libraries that print by themselves through ours, and keep chatty ones at WARNING."""
    for name in (*_UVICORN, "transformers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        # The access log would print query strings; the service writes its own.
        logger.propagate = name != "uvicorn.access"
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    # Its warnings print the key that a limit is counted by.
    logging.getLogger("slowapi").setLevel(logging.ERROR)


def bind_request_id(request_id: str) -> None:
    """Put the id on every later line of this request (task), whoever writes it."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def clear_request_id() -> None:
    """Take the id off again, where a task goes on to serve something else."""
    structlog.contextvars.unbind_contextvars("request_id")


def _arrange(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Put the fields that every line has in front; a value of the same name cannot replace them."""
    record: logging.LogRecord = event.pop("_record")
    del event["_from_structlog"]
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    head: EventDict = {
        "timestamp": moment.replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": event.pop("event"),
    }
    return {**head, **{key: value for key, value in event.items() if key not in head}}


def _json_line(logger: WrappedLogger, method: str, event: EventDict) -> str:
    # json escapes all but printable ASCII unless told otherwise.
    return json.dumps(event, default=repr, skipkeys=True)


def _console_line(logger: WrappedLogger, method: str, event: EventDict) -> str:
    trace = event.pop("exception", "")
    head = [str(event.pop(key)) for key in ("timestamp", "level", "logger", "message")]
    lines = [" ".join([*head, *(f"{key}={_shown(value)}" for key, value in event.items())])]
    # The bar keeps a line break inside an exception's message from looking like a line of its own.
    lines += [f"    | {line}" for line in trace.splitlines()]
    return "\n".join(_UNPRINTABLE.sub(_escaped, line) for line in lines)


def _shown(value: object) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def disable_foreign_tracing(allow_langsmith: bool) -> None:
    """Keep libraries from sending prompts, answers or figures of use to their makers.

    Call it before they are imported.

    Args: allow_langsmith: leave LangSmith's own variables as they are.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if allow_langsmith:
        return
    for namespace in ("LANGSMITH", "LANGCHAIN"):
        for name in ("TRACING", "TRACING_V2"):
            os.environ[f"{namespace}_{name}"] = "false"
    langsmith = sys.modules.get("langsmith.utils")
    if langsmith is not None:  # It remembers what it once read of the environment.
        langsmith.get_env_var.cache_clear()
