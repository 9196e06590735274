"""Liveness, readiness, status and metrics of the service; these routes report and never load a model."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, NotRequired, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from typing_extensions import TypedDict

from app.engine.model_states import State, model_states
from app.errors import InternalError, Unauthorized
from app.types import EngineState
from app.web.admin.models import ModelStateResponse
from app.web.http.dependencies import ContainerDep
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

    status: Literal["healthy"]
    model_loaded: bool
    model_name: str


class Readiness(TypedDict):
    """Whether a request sent now would be served."""

    status: Literal["ready", "loading", "unresponsive", "restarting", "draining", "failed", "unloaded"]
    database: NotRequired[str]
    """What is wrong with the database, while there is something; the model serves all the same."""


class Status(TypedDict):
    """The state of the service; what stands in the objects depends on the engine."""

    status: str
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


@router.get("/health")
async def health(container: ContainerDep) -> Health:
    """Return 200 while the process lives, whatever the model's state."""
    loaded = container.host.can_serve
    return {"status": "healthy", "model_loaded": loaded, "model_name": container.host.default_name}


@router.get(
    "/readyz",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Not now; `status` says why."}},
)
async def readyz(container: ContainerDep) -> JSONResponse:
    """Return 200 if a request sent now would be served, or the service does not need its default model."""
    state = container.host.state
    if container.host.draining or state is EngineState.CLOSED:
        return _not_ready("draining")
    if container.settings.model.required:
        if state is None:
            return _not_ready("unloaded")
        if state is not EngineState.READY:
            return _not_ready(state.value)
    # A fault of the database is no reason to send nothing here: replicas share it, and cached keys are served.
    fault = container.access.database.breaker.fault
    return JSONResponse({"status": "ready"} | ({"database": fault.value} if fault else {}))


def _not_ready(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, 503, headers={"Retry-After": str(_RETRY_SECONDS[status])})


@router.get("/status", responses=error_responses(Unauthorized, InternalError) | {200: {"model": Status}})
async def status(container: ContainerDep) -> Mapping[str, Any]:
    """Report the state of the model, its queue, the cache and the database."""
    fault = container.access.database.breaker.fault
    database = fault.value if fault else "ok"
    models = [asdict(each) for each in model_states(container.host, container.loader)]
    figures = {"embeddings": container.embeddings.status(), "models": models, "database": database}
    return {**container.service.status(), **figures}


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
