"""Observability: log lines and Prometheus metrics; third-party tracing stays off."""

from app.telemetry.logs import configure_logging, disable_foreign_tracing
from app.telemetry.metrics import Metrics

__all__ = ["Metrics", "configure_logging", "disable_foreign_tracing"]
