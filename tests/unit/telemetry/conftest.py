"""The process's loggers are the same before and after each test."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from app.telemetry import logs


@pytest.fixture(autouse=True)
def _restored_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the process's loggers as they were."""
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(logs, "STOP_SECONDS", 0.2)
    names = [*logs.UVICORN_LOGGERS, *logs.QUIET_LOGGERS, *logs.SECRETIVE_LOGGERS]
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in names}
    yield
    for name, (level, propagate) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = propagate
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
