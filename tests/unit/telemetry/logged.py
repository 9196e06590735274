"""Configures logging as the service does, and captures the lines."""

import io
import re
from collections.abc import Callable
from typing import Any

from app.config import LoggingConfig
from app.telemetry import Metrics, configure_logging


def logged(act: Callable[[], object], **config: Any) -> list[str]:
    """Return the lines that the service writes while `act` runs."""
    stream = io.StringIO()
    stop = configure_logging(LoggingConfig(**config), stream)
    try:
        act()
    finally:
        stop()
    return stream.getvalue().splitlines(keepends=True)


def dropped() -> float:
    """Return how many lines were lost since the process began."""
    scrape = Metrics([]).render()[0].decode()
    return float(re.findall(r"^log_lines_dropped_total (.*)$", scrape, re.MULTILINE)[0])
