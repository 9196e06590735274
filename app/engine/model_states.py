"""The state of every model, loaded or not, for /status, the routes that load models, and the metrics."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from app.engine.base import EngineInfo, EngineStatus, LoadProgress
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.served_model import Served, ServedEncoder, ServedModel
from app.errors import AppError
from app.telemetry.model_figures import ModelFigures, UpstreamFigures
from app.types import EngineState

State = Literal["unloaded", "loading", "ready", "unresponsive", "restarting", "failed", "unloading"]

_STATES: Mapping[EngineState, State] = {
    EngineState.LOADING: "loading",
    EngineState.READY: "ready",
    EngineState.UNRESPONSIVE: "unresponsive",
    EngineState.RESTARTING: "restarting",
    EngineState.FAILED: "failed",
    EngineState.CLOSED: "unloading",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """One model, loaded or not."""

    name: str
    state: State
    task: Literal["generate", "embed"] = "generate"
    default: bool = False
    """Whether it serves requests that name no model."""
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    memory_bytes: int | None = None
    """Resident memory of its worker process."""
    device_memory_bytes: int | None = None
    """Memory that it took on a GPU when it was loaded, the KV cache included."""
    device_memory_total_bytes: int | None = None
    slots: int | None = None
    """Requests that run at once."""
    running: int = 0
    waiting: int = 0
    requests: int = 0
    """Requests since it was loaded."""
    restarts: int = 0
    progress: LoadProgress | None = None
    """Of a load that is under way, of this model or of the one that is to replace it."""
    last_error: str | None = None
    error_reason: str | None = None
    """Why its last load failed, in a word."""
    adapters: tuple[str, ...] = ()
    """Those that requests can name."""
    refused_adapters: Mapping[str, str] = field(default_factory=dict)
    """Adapters of its name that it could not be loaded with, and why."""


def model_states(host: ModelHost, loader: ModelLoader) -> list[ModelState]:
    """Return the state of every model: the loaded ones, those under way, and those that can be loaded by their name."""
    names = [*host.names, *loader.loads, *loader.known, *loader.failures]
    return [model_state(name, host, loader) for name in dict.fromkeys(names)]


def model_state(name: str, host: ModelHost, loader: ModelLoader) -> ModelState:
    """Return the state of one model; one that nobody knows is unloaded."""
    load, failure = loader.loads.get(name), loader.failures.get(name)
    about: dict[str, Any] = {"name": name, "default": name == host.default_name}
    if load is not None:
        about["progress"] = load.progress
    if failure is not None:
        about |= {"last_error": failure.message, "error_reason": failure.details.get("reason", "failed")}
    model = next((each for each in host.models if each.name == name), None)
    if model is None:
        state: State = "loading" if load is not None else "failed" if failure is not None else "unloaded"
        return ModelState(**about, state=state)
    state = "unloading" if name not in host.loaded else _state(model.engine.status())
    return ModelState(**(dict(_figures(model, host)) | about), state=state)


def _state(status: EngineStatus) -> State:
    return _STATES[status.state]


def _figures(model: Served, host: ModelHost) -> Iterator[tuple[str, Any]]:
    status, info = model.engine.status(), _info(model)
    yield "task", "embed" if isinstance(model, ServedEncoder) else "generate"
    if info is not None:
        yield from (("device", info.device), ("dtype", info.dtype), ("revision", info.revision))
    yield "memory_bytes", status.worker_rss_bytes
    yield "device_memory_bytes", status.device_bytes
    yield "device_memory_total_bytes", status.device_total_bytes
    yield from (("slots", status.slots), ("running", status.running), ("waiting", status.waiting))
    yield "requests", host.use_of(model.name).requests
    yield "restarts", status.restarts
    yield "progress", status.progress
    yield "last_error", status.error
    adapters = host.adapters.of_model(model.name)
    yield "adapters", tuple(each.name for each in adapters if each.name in host.adapter_names)
    yield "refused_adapters", {each.name: each.problem for each in adapters if each.problem is not None}


def _info(model: Served) -> EngineInfo | None:
    """Return None until the model is loaded."""
    try:
        return model.engine.info
    except AppError:
        return None


def model_figures(model: Served) -> ModelFigures:
    """Return the gauges of a model."""
    status = model.engine.status()
    adapters = model.adapters if isinstance(model, ServedModel) else None
    running, waiting = adapters.adapters_in_use() if adapters is not None else ((), ())
    return ModelFigures(
        model=model.name,
        ready=status.state is EngineState.READY,
        running=status.running,
        waiting=status.waiting,
        restarts=status.restarts,
        rows=status.slots,
        worker_bytes=status.worker_rss_bytes,
        device_bytes=status.device_bytes or 0,
        adapters_running=running,
        adapters_waiting=waiting,
    )


def upstream_figures(model: Served) -> Iterator[UpstreamFigures]:
    """Yield the gauges of the upstream servers of a model."""
    for each in model.engine.status().upstreams:
        yield UpstreamFigures(
            model=model.name, number=each.number, ready=each.ready, running=each.running, failures=each.failures
        )
