"""Observability: log lines and Prometheus metrics; third-party tracing stays off."""

from app.telemetry.logs import configure_logging, disable_foreign_tracing
from app.telemetry.metrics import Metrics
from app.telemetry.model_metrics import ModelMetrics

__all__ = ["Metrics", "ModelMetrics", "configure_logging", "disable_foreign_tracing"]
