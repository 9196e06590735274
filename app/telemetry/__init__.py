"""What the service tells of itself: log lines and metrics, and nothing to anyone else."""

from app.telemetry.logs import bind_request_id, clear_request_id, configure_logging, disable_foreign_tracing
from app.telemetry.metrics import Metrics

__all__ = ["Metrics", "bind_request_id", "clear_request_id", "configure_logging", "disable_foreign_tracing"]
