"""Translates the state of a worker process into the status, the facts and the errors of an engine."""

import os
from pathlib import Path

from app.engine.base import EngineInfo, EngineStatus, LoadProgress
from app.errors import EngineNotReady
from app.ipc.messages import Ready
from app.ipc.supervisor import Supervisor
from app.types import EngineState

LOADING_RETRY_SECONDS = 5.0


def engine_status(worker: Supervisor, *, running: int, waiting: int, ready: Ready | None) -> EngineStatus:
    """Return where an engine stands now.  Args: ready: what the worker said when it had loaded its model."""
    loading = worker.progress if worker.state is EngineState.LOADING else None
    return EngineStatus(
        state=worker.state,
        running=running,
        waiting=waiting,
        restarts=worker.restarts,
        error=worker.error,
        worker_pid=worker.worker_pid,
        worker_rss_bytes=_rss_bytes(worker.worker_pid),
        slots=ready.slots if ready else None,
        device_bytes=ready.device_bytes if ready else None,
        device_total_bytes=ready.device_total_bytes if ready else None,
        progress=LoadProgress(loading.stage, loading.bytes_done, loading.bytes_total) if loading else None,
    )


def engine_info(model: str, ready: Ready) -> EngineInfo:
    """Return the facts about a loaded model that hold for every kind.  Args: model: its public name."""
    return EngineInfo(
        model=model,
        revision=ready.revision,
        engine=ready.runner,
        device=ready.device,
        dtype=ready.dtype,
        context_length=ready.context_length,
        vocab_size=ready.vocab_size,
        parameters=ready.parameters,
        embedding=ready.embedding,
    )


def not_ready(worker: Supervisor) -> EngineNotReady:
    """Return the error for a request that comes while the worker cannot serve it."""
    match worker.state:
        case EngineState.LOADING | EngineState.READY:
            message = f"The model is still loading ({worker.progress.stage})."
            return EngineNotReady(message, retry_after=LOADING_RETRY_SECONDS)
        case EngineState.UNRESPONSIVE:
            return EngineNotReady("The model's worker does not respond.", retry_after=LOADING_RETRY_SECONDS)
        case EngineState.RESTARTING:
            return EngineNotReady("The model is being started again.", retry_after=LOADING_RETRY_SECONDS)
        case EngineState.FAILED:
            return EngineNotReady("The model could not be loaded.")
        case EngineState.CLOSED:
            return EngineNotReady("The engine is closed.")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _rss_bytes(pid: int | None) -> int | None:
    if pid is None:
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
