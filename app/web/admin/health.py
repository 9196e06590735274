"""Liveness, readiness, status and metrics of the service; these routes report and never load a model."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

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


@router.get("/")
async def about(request: Request) -> dict[str, Any]:
    """Name the service and link its main routes."""
    app = request.app
    links = {"health": "/health", "ready": "/readyz", "generate": "/v1/generate", "chat": "/v1/chat"}
    if app.docs_url:
        links["docs"] = app.docs_url
    return {"name": app.title, "version": app.version, "links": links}


@router.get("/health")
async def health(container: ContainerDep) -> dict[str, Any]:
    """Return 200 while the process lives, whatever the model's state."""
    loaded = container.host.can_serve
    return {"status": "healthy", "model_loaded": loaded, "model_name": container.host.default_name}


@router.get("/readyz", responses={503: {"description": "Not now; `status` says why."}})
async def readyz(container: ContainerDep) -> JSONResponse:
    """Return 200 if a request sent now would be served."""
    state = container.host.state
    if container.host.draining or state is EngineState.CLOSED:
        return _not_ready("draining")
    if state is None:
        return _not_ready("unloaded")
    if state is not EngineState.READY:
        return _not_ready(state.value)
    return JSONResponse({"status": "ready"})


def _not_ready(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, 503, headers={"Retry-After": str(_RETRY_SECONDS[status])})


@router.get("/status", responses=error_responses(Unauthorized, InternalError))
async def status(container: ContainerDep) -> Mapping[str, Any]:
    """Report the state of the model, its queue and the cache."""
    return container.service.status()


@router.get("/metrics", response_class=Response)
async def metrics(container: ContainerDep) -> Response:
    """Report all metrics in Prometheus' text format."""
    content, media_type = container.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
