"""What operators and their machines ask: is it alive, is it ready, how is it doing.  Reports; never loads anything."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app.errors import InternalError, Unauthorized
from app.types import EngineState
from app.web.http.dependencies import PartsDep
from app.web.http.errors import document

PUBLIC_PATHS = frozenset(["/", "/health", "/readyz"])
"""Answered without a key."""
ALWAYS_PATHS = frozenset(["/health", "/readyz", "/metrics"])
"""Answered even while the service drains."""

_RETRY_SECONDS = {"loading": 5, "restarting": 5, "draining": 5, "failed": 30}

router = APIRouter(tags=["operations"])


@router.get("/")
async def about(request: Request) -> dict[str, Any]:
    """Say what this is and where to go on."""
    app = request.app
    links = {"health": "/health", "ready": "/readyz", "generate": "/v1/generate", "chat": "/v1/chat"}
    if app.docs_url:
        links["docs"] = app.docs_url
    return {"name": app.title, "version": app.version, "links": links}


@router.get("/health")
async def health(parts: PartsDep) -> dict[str, Any]:
    """Answer 200 as long as the process lives, whatever the model does."""
    loaded = parts.engines.default.status().state is EngineState.READY
    return {"status": "healthy", "model_loaded": loaded, "model_name": parts.engines.default_name}


@router.get("/readyz", responses={503: {"description": "Not now; `status` says why."}})
async def readyz(parts: PartsDep) -> JSONResponse:
    """Answer 200 if a request sent now would be served."""
    state = parts.engines.default.status().state
    if parts.engines.draining or state is EngineState.CLOSED:
        return _not_ready("draining")
    if state is not EngineState.READY:
        return _not_ready(state.value)
    return JSONResponse({"status": "ready"})


def _not_ready(status: str) -> JSONResponse:
    return JSONResponse({"status": status}, 503, headers={"Retry-After": str(_RETRY_SECONDS[status])})


@router.get("/status", responses=document(Unauthorized, InternalError))
async def status(parts: PartsDep) -> Mapping[str, Any]:
    """Report the model, its queue and the cache in figures."""
    return await parts.service.status()


@router.get("/metrics", response_class=Response)
async def metrics(parts: PartsDep) -> Response:
    """Report all figures in Prometheus' text format."""
    content, media_type = parts.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
