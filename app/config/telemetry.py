"""Defines the settings of logs and traces, and checks the address of the traces' collector."""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from app.config.section import Section

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
OWN_LOGGERS = ("app", "llm_service")
"""The service's own loggers and, by their names, all below them; they alone write lines of level DEBUG."""


class LoggingConfig(Section):
    """One line per event on standard error, and in a file if configured."""

    level: LogLevel = "INFO"
    """The least severe lines that are written."""
    levels: dict[str, LogLevel] = Field(default_factory=dict)
    """Levels of single loggers and of those below them, such as `app.engine: DEBUG`."""
    format: Literal["auto", "json", "console"] = "auto"
    """auto is console, lines for people, on a terminal without a log file, and json everywhere else."""
    file: Path | None = None
    """Also write lines to this file, rotated, readable by its owner only."""
    max_bytes: PositiveInt = 10_485_760
    """Size at which the log file is rotated."""
    backups: NonNegativeInt = 3
    """Number of rotated log files."""
    store_text: bool = False
    """Store prompts and completions, with personal data masked, in the inference log."""

    @field_validator("levels")
    @classmethod
    def _libraries_say_little(cls, value: dict[str, LogLevel]) -> dict[str, LogLevel]:
        for name, level in value.items():
            if level == "DEBUG" and name.partition(".")[0] not in OWN_LOGGERS:
                raise ValueError(f"DEBUG is for {' and '.join(OWN_LOGGERS)}: what libraries say there holds prompts")
        return value


class TracingConfig(Section):
    """Spans of requests, which OTEL_EXPORTER_OTLP_ENDPOINT switches on."""

    max_per_second: PositiveInt = 20
    """Traces that begin here in a second, so that many small requests do not all pay for one; OTEL_TRACES_SAMPLER
    takes its place, and the trace of a caller is continued as the caller says."""
    store_text: bool = False
    """Put prompts and completions into the spans, with personal data masked."""


def checked_endpoint(url: str) -> str:
    """Raises: ValueError: this is no address of a collector that is spoken to by HTTP."""
    if not url:
        return url
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("this is no address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("must begin with http:// or https:// and name a collector of OTLP over HTTP")
    return url


def checked_protocol(protocol: str) -> str:
    """Raises: ValueError: spans are not sent in this way."""
    if protocol not in ("", "http/protobuf"):
        raise ValueError("only http/protobuf is spoken here; collectors take it on port 4318")
    return protocol
