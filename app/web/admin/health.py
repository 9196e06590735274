"""Liveness, readiness, status and metrics of the service; these routes report and never load a model."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from typing_extensions import TypedDict

from app.errors import InternalError, Unauthorized
from app.types import EngineState
from app.web.http.dependencies import ContainerDep
from app.web.http.errors import error_responses

PUBLIC_PATHS = frozenset(["/", "/health", "/readyz"])
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
    sessions: int | None
    database: str
    """`ok`, or what is wrong with it."""


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
    """Return 200 if a request sent now would be served."""
    state = container.host.state
    if container.host.draining or state is EngineState.CLOSED:
        return _not_ready("draining")
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
    return {**container.service.status(), "embeddings": container.embeddings.status(), "database": database}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(container: ContainerDep) -> Response:
    """Report all metrics in Prometheus' text format."""
    content, media_type = container.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
