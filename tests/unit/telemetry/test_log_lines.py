"""The format of log lines, and that no content can forge another one."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from opentelemetry.trace import TraceState
from structlog.contextvars import bind_contextvars, unbind_contextvars

from app.config import LoggingConfig
from app.telemetry import configure_logging
from tests.unit.telemetry.logged import logged

CANARY = "one\r\ntwo\x1b[31m\x9b2J\u2028three\u202efour\x7f\ud800"


def test_a_json_line_has_the_documented_fields_in_front() -> None:
    """Time in UTC, level, logger, message, and then what the caller adds."""
    log = structlog.get_logger("llm_service")

    [line] = logged(lambda: log.info("POST /v1/generate - 200", method="POST", status_code=200, latency_ms=1234.56))
    fields = json.loads(line)

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("timestamp"))
    assert {
        "level": "INFO",
        "logger": "llm_service",
        "message": "POST /v1/generate - 200",
        "method": "POST",
        "status_code": 200,
        "latency_ms": 1234.56,
    } == fields
    assert line.startswith('{"timestamp": ')


def test_the_standard_librarys_loggers_write_the_same_format() -> None:
    """uvicorn's own lines too."""

    def act() -> None:
        logging.getLogger("uvicorn.error").info("Started %s", "now")
        structlog.get_logger("ours").info("Started %s", "now")

    lines = logged(act)

    theirs, ours = map(json.loads, lines)
    assert ("INFO", "uvicorn.error", "Started now") == (theirs["level"], theirs["logger"], theirs["message"])
    assert ("INFO", "ours", "Started now") == (ours["level"], ours["logger"], ours["message"])


def test_the_request_id_is_on_every_line_of_a_request() -> None:
    """Whichever logger writes it, until it is unbound."""

    def request() -> None:
        bind_contextvars(request_id="req-1")
        structlog.get_logger("a").info("ours")
        logging.getLogger("b").warning("theirs")
        unbind_contextvars("request_id")
        structlog.get_logger("a").info("after")

    assert ["req-1", "req-1", None] == [json.loads(line).get("request_id") for line in logged(request)]


async def test_concurrent_requests_have_their_own_ids_on_their_lines() -> None:
    """Each task logs its own id."""
    stream = io.StringIO()
    stop = configure_logging(LoggingConfig(), stream)

    async def request(name: str) -> None:
        bind_contextvars(request_id=name)
        await asyncio.sleep(0.001)
        structlog.get_logger("a").info(name)

    await asyncio.gather(*(request(f"r{number}") for number in range(10)))
    stop()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]

    assert 10 == len(lines)
    assert all(line["message"] == line["request_id"] for line in lines)


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("place", ["message", "value", "nested", "key", "stdlib", "id"])
def test_nothing_logged_can_begin_a_line_or_steer_a_terminal(style: str, place: str) -> None:
    """Line breaks, escapes, bidirectional marks and lone surrogates, wherever they stand."""
    log = structlog.get_logger("a")
    acts: dict[str, Callable[[], object]] = {
        "message": lambda: log.info(CANARY),
        "value": lambda: log.info("x", value=CANARY),
        "nested": lambda: log.info("x", value={"a": [CANARY]}),
        "key": lambda: log.info("x", **{CANARY: 1}),
        "stdlib": lambda: logging.getLogger("b").warning("x %s", CANARY),
        "id": lambda: (bind_contextvars(request_id=CANARY), log.info("x")),
    }

    lines = logged(acts[place], format=style)

    assert 1 == len(lines)
    assert re.fullmatch(r"[\x20-\x7e]+\n", lines[0])
    assert "three" in lines[0]


def test_a_console_line_reads_like_a_sentence() -> None:
    """Values with blanks are quoted, others are not; letters stay letters."""
    [line] = logged(lambda: structlog.get_logger("a").warning("hello", n=1, who="Zoë", what="a b"), format="console")

    assert line.endswith(" [WARNING] hello [a] n=1 who=Zoë what='a b'\n")


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_traceback_shows_no_local_variables_and_forges_no_line(style: str) -> None:
    """The place of an error is logged, what was in memory is not; its message cannot pose as a log line."""

    def fail() -> None:
        prompt = "".join(["my ", "secret ", "prompt"])
        try:
            raise ValueError(f'{len(prompt)}\n{{"level": "FORGED"}}')
        except ValueError:
            structlog.get_logger("a").exception("failed")

    lines = logged(fail, format=style)

    assert "secret prompt" not in "".join(lines)
    assert "in fail" in "".join(lines)
    assert 1 == sum(line.startswith(("{", "2")) for line in lines)


def test_a_value_cannot_replace_a_field_of_the_line() -> None:
    """What a caller passes as `level` or `logger` does not hide the real one."""
    [line] = logged(lambda: structlog.get_logger("a").info("x", level="FORGED", logger="FORGED", timestamp="FORGED"))

    assert "FORGED" not in line


def test_lines_below_the_level_are_not_written() -> None:
    """The level holds for both kinds of logger."""

    def act() -> None:
        structlog.get_logger("a").info("no")
        logging.getLogger("b").info("no")
        structlog.get_logger("a").warning("yes")

    assert ["yes"] == [json.loads(line)["message"] for line in logged(act, level="WARNING")]


def test_libraries_that_log_what_clients_send_are_silenced() -> None:
    """Even at DEBUG: no answer text, no query strings, no rate-limit keys."""

    def act() -> None:
        logging.getLogger("sse_starlette.sse").debug("chunk: secret")
        logging.getLogger("httpx").info("GET http://host/?q=secret")
        logging.getLogger("langchain_core.tracers").info("secret")
        logging.getLogger("uvicorn.access").info("GET /?q=secret")
        logging.getLogger("slowapi").warning("ratelimit exceeded for key secret")
        TraceState.from_header(["a secret in the header tracestate"])
        logging.getLogger("transformers.generation").warning("shown")

    assert ["shown"] == [json.loads(line)["message"] for line in logged(act, level="DEBUG")]


def test_only_the_services_own_lines_are_below_info() -> None:
    """Drivers say statements with their values there; not even one that is set to DEBUG by somebody says them here."""

    def act() -> None:
        for name in ("aiosqlite", "asyncpg", "asyncio", "sqlalchemy.engine.Engine", "urllib3", "application"):
            logging.getLogger(name).setLevel(logging.DEBUG)
            logging.getLogger(name).debug("executing INSERT with secret")
            logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger("unheard_of").info("said")
        structlog.get_logger("llm_service").debug("ours")
        logging.getLogger("app.access.database").debug("ours too")

    assert ["said", "ours", "ours too"] == [json.loads(line)["message"] for line in logged(act, level="DEBUG")]
    assert not logging.getLogger("app").isEnabledFor(logging.DEBUG)


def test_what_uvicorn_installs_of_its_own_is_removed() -> None:
    """Each of its lines appears once."""
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger("uvicorn").addHandler(handler)

    lines = logged(lambda: logging.getLogger("uvicorn.error").info("once"))

    assert 1 == len(lines)
    assert "" == stream.getvalue()
    assert not logging.getLogger("uvicorn.access").hasHandlers()


def test_single_loggers_have_levels_of_their_own() -> None:
    """Those below them too, and both kinds of logger."""

    def act() -> None:
        structlog.get_logger("app.engine.local").debug("ours")
        logging.getLogger("app.web").info("too low")
        logging.getLogger("httpx").info("theirs")
        logging.getLogger("alembic.runtime").warning("silenced")

    levels = {"app.engine": "DEBUG", "httpx": "INFO", "alembic": "ERROR"}
    lines = logged(act, level="WARNING", levels=levels)

    assert ["ours", "theirs"] == [json.loads(line)["message"] for line in lines]


def test_what_libraries_say_at_debug_can_not_be_asked_for() -> None:
    """They print statements with their values there, and bodies."""
    with pytest.raises(ValueError, match="what libraries say there holds prompts"):
        LoggingConfig(levels={"sqlalchemy.engine": "DEBUG"})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "config", "as_json"),
    [
        (Terminal, {}, False),
        (io.StringIO, {}, True),
        (Terminal, {"format": "json"}, True),
        (io.StringIO, {"format": "console"}, False),
        (Terminal, {"file": "log"}, True),
    ],
)
def test_a_terminal_gets_lines_for_people_and_everything_else_json(
    tmp_path: Path, stream: type[io.StringIO], config: dict[str, str], as_json: bool
):
    """A log file is for programs, and has the same lines."""
    if "file" in config:
        config = config | {"file": str(tmp_path / config["file"])}
    output = stream()

    stop = configure_logging(LoggingConfig.model_validate(config), output)
    structlog.get_logger("app").info("hello")
    stop()

    assert as_json == output.getvalue().startswith("{")
    assert "hello" in output.getvalue()
