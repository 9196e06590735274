"""Liveness, readiness, status and metrics of the service; these routes report and never load a model."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, NotRequired, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from typing_extensions import TypedDict

from app.engine.model_states import State, model_states
from app.errors import AppError, InternalError, Unauthorized
from app.types import EngineState
from app.web.admin.models import ModelStateResponse
from app.web.http.dependencies import CallerIfKnownDep, Container, ContainerDep
from app.web.http.errors import error_responses

PUBLIC_PATHS = frozenset(["/", "/health", "/readyz", "/info"])
"""Paths that need no key."""
ALWAYS_PATHS = frozenset(["/health", "/readyz", "/metrics"])
"""Paths that are served while the service drains, too."""

_RETRY_SECONDS = {"loading": 5, "unresponsive": 5, "restarting": 5, "draining": 5, "failed": 30, "unloaded": 30}

router = APIRouter(tags=["operations"])


class About(TypedDict):
    """The service, and where to go."""

    name: str
    version: str
    links: dict[str, str]


class Health(TypedDict):
    """The process lives."""

    status: Literal["healthy", "ok"]
    """As `compat.health_status` configures it; it tells of the process and not of the model."""
    service: str
    api_status: Literal["running"]
    model_status: str
    """`loaded`, or why the model cannot serve a request now."""
    model_loaded: bool
    model_name: str
    gpu_status: Literal["available", "unavailable"]
    """Whether the model is on a GPU."""
    timestamp: str
    uptime_seconds: float


class Readiness(TypedDict):
    """Whether a request sent now would be served."""

    status: Literal["ready", "loading", "unresponsive", "restarting", "draining", "failed", "unloaded"]
    database: NotRequired[str]
    """What is wrong with the database, while there is something; the model serves all the same."""
    redis: NotRequired[str]
    """The same of Redis."""


class PublicStatus(TypedDict):
    """The part of the state that every caller may know."""

    status: str
    """Device and model in words, such as `cuda: model loaded on GPU`."""
    state: str
    """The state of the model in a word, as /readyz has it."""
    uptime_seconds: float
    model: dict[str, Any]
    cache: dict[str, Any] | None


class Status(TypedDict):
    """The state of the service; what stands in the objects depends on the engine."""

    status: str
    """Device and model in words, such as `cuda: model loaded on GPU`."""
    state: str
    """The state of the model in a word, as /readyz has it."""
    uptime_seconds: float
    model: dict[str, Any]
    engine: dict[str, Any] | None
    cache: dict[str, Any] | None
    embeddings: dict[str, Any]
    """The engine of each model that only embeds, by the model's name."""
    models: list[ModelStateResponse]
    """Every model, loaded or not."""
    sessions: int | None
    database: str
    """`ok`, or what is wrong with it."""
    redis: str | None
    """The same; null if none is configured."""
    rate_limits: Literal["process", "shared", "share", "closed"]
    """Who enforces them: this process alone, all together in Redis, or, while that is away, this process its share of
    them; closed: nobody, and limited requests are refused."""


class RegistryFacts(TypedDict):
    """What the registry says of a model that comes from it."""

    name: str
    version: str
    alias: str | None
    stage: str | None
    run_id: str | None
    metrics: dict[str, float]
    tags: dict[str, str]
    digest: str | None
    """Of its files."""
    refused_version: str | None
    """The version that the alias means by now, and that failed when it was to take over."""


class ModelFacts(TypedDict):
    """One model, loaded or not."""

    name: str
    state: State
    default: bool
    task: Literal["generate", "embed"]
    device: str | None
    dtype: str | None
    revision: str | None
    memory_bytes: int | None
    device_memory_bytes: int | None
    slots: int | None
    running: int
    waiting: int
    requests: int
    progress: dict[str, Any] | None
    error_reason: str | None
    """Why its last load failed, in a word; /status, which needs a key, says more."""
    registry: RegistryFacts | None


class Info(TypedDict):
    """The service and its models."""

    name: str
    version: str
    model: str
    """The name of the default model."""
    ready: bool
    """Whether it can serve a request now."""
    models: list[ModelFacts]


@router.get("/")
async def about(request: Request) -> About:
    """Name the service and link its main routes."""
    app = request.app
    links = {"health": "/health", "ready": "/readyz", "generate": "/v1/generate", "chat": "/v1/chat"}
    if app.openapi_url:
        links["docs"] = "/docs"
    return {"name": app.title, "version": app.version, "links": links}


@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "Only if so configured: no request would be served now."}},
)
async def health(container: ContainerDep) -> JSONResponse:
    """Return 200 while the process lives, whatever the model's state, unless `compat.health_needs_model` is set."""
    host, compat = container.host, container.settings.compat
    device = _device(container)
    body: Health = {
        "status": compat.health_status,
        "service": container.settings.app.name,
        "api_status": "running",
        "model_status": "loaded" if host.can_serve else _state(container),
        "model_loaded": host.can_serve,
        "model_name": host.default_name,
        "gpu_status": "available" if device not in (None, "cpu") else "unavailable",
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "uptime_seconds": _uptime(container),
    }
    reason = _unready(container) if compat.health_needs_model else None
    return JSONResponse(body) if reason is None else JSONResponse(body, 503, headers=_retry_after(reason))


@router.get(
    "/readyz",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not now; `status` says why."}},
)
async def readyz(container: ContainerDep) -> JSONResponse:
    """Return 200 if a request sent now would be served, or the service does not need its default model."""
    if (reason := _unready(container)) is not None:
        return JSONResponse({"status": reason}, 503, headers=_retry_after(reason))
    # A fault of the database is no reason to send nothing here: replicas share it, and cached keys are served.
    fault = container.access.database.breaker.fault
    redis = container.redis.fault if container.redis else None
    faults = {"database": fault, "redis": redis}
    return JSONResponse({"status": "ready"} | {name: each.value for name, each in faults.items() if each})


def _redis_in_words(container: Container) -> str | None:
    if container.redis is None:
        return None
    return container.redis.fault.value if container.redis.fault else "ok"


def _rate_limits(container: Container) -> str:
    """Return who enforces the rate limits now."""
    if container.redis is None:
        return "process"
    return container.settings.rate_limit.on_outage if container.redis.fault else "shared"


def _unready(container: Container) -> str | None:
    """Return why a request sent now would not be served; None if it would be, or need not be."""
    state = _state(container)
    if state == "draining":
        return state
    return state if container.settings.model.required and state != "ready" else None


def _state(container: Container) -> str:
    """Return the state of the default model in a word."""
    state = container.host.state
    if container.host.draining or state is EngineState.CLOSED:
        return "draining"
    return "unloaded" if state is None else state.value


def _retry_after(reason: str) -> Mapping[str, str]:
    return {"Retry-After": str(_RETRY_SECONDS[reason])}


def _device(container: Container) -> str | None:
    """Return the device of the default model; None until it is loaded."""
    try:
        return container.host.default.engine.info.device
    except AppError:
        return None


def _uptime(container: Container) -> float:
    return round(time.monotonic() - container.began, 1)


def _in_words(container: Container) -> str:
    """Return device and model in words."""
    device, state = _device(container), _state(container)
    if device is None or state != "ready":
        return f"model {state}"
    kind = device.partition(":")[0]
    return f"{kind}: model loaded on {'CPU' if kind == 'cpu' else 'GPU'}"


@router.get(
    "/status",
    response_model=Status | PublicStatus,
    responses=error_responses(Unauthorized, InternalError) | {200: {"model": Status | PublicStatus}},
)
async def status(container: ContainerDep, caller: CallerIfKnownDep) -> JSONResponse:
    """Report the state of the model, its queue, the cache and the database; without a key, of model and cache only."""
    figures = dict(container.service.status())
    shown = {**figures, "status": _in_words(container), "state": _state(container)}
    if caller is None:
        public = {name: shown.get(name) for name in PublicStatus.__annotations__}
        model = {"model": container.host.default_name, "device": _device(container)}
        return JSONResponse(public | {"uptime_seconds": _uptime(container), "model": model})
    fault = container.access.database.breaker.fault
    models = [ModelStateResponse.of(each).model_dump() for each in model_states(container.host, container.loader)]
    return JSONResponse(
        shown
        | {
            "embeddings": container.embeddings.status(),
            "models": models,
            "database": fault.value if fault else "ok",
            "redis": _redis_in_words(container),
            "rate_limits": _rate_limits(container),
        }
    )


@router.get("/info")
async def info(request: Request, container: ContainerDep) -> Info:
    """Describe the service and every model; needs no key, so it names no paths, processes or messages."""
    states = [
        asdict(each) | {"registry": container.registered and container.registered.facts(each.revision)}
        for each in model_states(container.host, container.loader)
    ]
    shown = [{name: state[name] for name in ModelFacts.__annotations__} for state in states]
    return {
        "name": request.app.title,
        "version": request.app.version,
        "model": container.host.default_name,
        "ready": container.host.can_serve,
        "models": cast(list[ModelFacts], shown),
    }


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(container: ContainerDep) -> Response:
    """Report all metrics in Prometheus' text format."""
    content, media_type = container.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
