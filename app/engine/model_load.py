"""One load of a model: its progress, its outcome, and the errors for those who wait for it."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from app.engine.base import HostedEngine, LoadProgress
from app.engine.model_source import LoadSpec
from app.engine.served_model import Served
from app.errors import (
    AppError,
    Conflict,
    EngineFailed,
    EngineNotReady,
    InsufficientMemory,
    ModelLoadFailed,
    ServiceUnavailable,
)

POLL_SECONDS = 0.2
"""How often the progress of a load is looked at."""
WAITING = LoadProgress("waiting")


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """Why a model could not be loaded."""

    at: float
    """By the monotonic clock."""
    message: str
    details: Mapping[str, Any]


class Load:
    """A load that is under way, or was."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.task: asyncio.Task[Served]
        self.engine: HostedEngine | None = None
        """Set once the load begins; other loads may come first."""
        self.end_error: AppError = Conflict("The model was unloaded before it was loaded.")
        """Raised for those who wait for it, if it is cancelled."""

    @property
    def progress(self) -> LoadProgress:
        """Return how far it has come."""
        return WAITING if self.engine is None else self.engine.status().progress or LoadProgress("ready")

    async def wait(self) -> Served:
        """Return the model once it serves; cancelling this leaves the load as it is.

        Raises: ModelLoadFailed, InsufficientMemory, EngineBusy, ServiceUnavailable: it does not; Conflict,
            ShuttingDown: it was ended.
        """
        await asyncio.wait({self.task})
        if self.task.cancelled():
            raise self.end_error
        return self.task.result()

    async def updates(self) -> AsyncGenerator[LoadProgress, None]:
        """Yield the progress each time that it has changed, until the load has ended; `wait` then says how."""
        last = None
        while not self.task.done():
            if (now := self.progress) != last:
                last = now
                yield now
            await asyncio.wait({self.task}, timeout=POLL_SECONDS)

    def still_loading(self) -> EngineNotReady:
        """Return the error for a request that names the model meanwhile."""
        progress = self.progress
        details = {"stage": progress.stage, "bytes_done": progress.bytes_done, "bytes_total": progress.bytes_total}
        return EngineNotReady(
            f"The model is being loaded ({progress.stage}).",
            details={name: value for name, value in details.items() if value is not None},
            retry_after=5,
        )


def finished_load(spec: LoadSpec, model: Served) -> Load:
    """Return the load of a model that is loaded already."""

    async def found() -> Served:
        return model

    load = Load(spec)
    load.engine = model.engine
    load.task = asyncio.create_task(found())
    return load


def load_error(error: EngineFailed) -> AppError:
    """Return the error that reports a failed load, by its reason."""
    match error.details.get("reason"):
        case "no_memory":
            return InsufficientMemory(error.message, details=error.details)
        case "unreachable":
            return ServiceUnavailable(error.message, details=error.details)
        case _:
            # Without a reason: its process was killed.
            return ModelLoadFailed(error.message, details={"reason": "failed", **error.details})
