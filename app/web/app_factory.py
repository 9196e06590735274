"""Decide what the web application is made of and in which order; `create_app` and the tests build it here.

Builds no object of its own but the FastAPI application.
"""

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from app import __version__
from app.web.admin import health as ops
from app.web.admin import keys, roles, usage
from app.web.http.authentication import Authentication
from app.web.http.dependencies import Parts
from app.web.http.errors import add_handlers
from app.web.http.middleware import BodyLimits, DrainGate, ErrorBoundary, RequestLog
from app.web.native import batch, chat, generate, sessions
from app.web.openai import chat as openai_chat
from app.web.openai import completions as openai_completions
from app.web.openai import models as openai_models

_DOCS_URL, _OPENAPI_URL = "/docs", "/openapi.json"

# For the OpenAPI document alone; `Authentication` has let the caller in long before.
_KEY_SCHEMES = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False))]


def build_app(parts: Parts, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Put routes, error handlers and middlewares together around the given objects."""
    docs = parts.settings.security.docs
    app = FastAPI(
        title=parts.settings.app.name,
        version=__version__,
        docs_url=_DOCS_URL if docs else None,
        openapi_url=_OPENAPI_URL if docs else None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # A redirect would be made of the client's Host header.
        redirect_slashes=False,
        # Its log records hold what clients sent.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=lifespan,
    )
    app.state.parts = parts
    openai = openai_chat, openai_completions, openai_models
    routers = [module.router for module in (generate, batch, chat, sessions, *openai, keys, roles, usage)]
    for router in (*routers, keys.seed_router):
        app.include_router(router, dependencies=_KEY_SCHEMES)
    app.include_router(ops.router)
    add_handlers(app)
    _add_middlewares(app, parts)
    return app


def _add_middlewares(app: FastAPI, parts: Parts) -> None:
    """Innermost first: each one added goes around those before it.  `middleware.py` says why this order."""
    security = parts.settings.security
    app.add_middleware(
        Authentication,
        keys=parts.keys,
        failed_keys=parts.failed_keys,
        metrics=parts.metrics,
        public=public_paths(parts),
    )
    app.add_middleware(DrainGate, engines=parts.engines, always=ops.ALWAYS_PATHS)
    app.add_middleware(ErrorBoundary)
    app.add_middleware(BodyLimits, max_bytes=security.max_body_bytes, timeout_seconds=security.body_timeout_seconds)
    if security.cors_origins:
        app.add_middleware(CORSMiddleware, **_cors(security.cors_origins))
    app.add_middleware(RequestLog, metrics=parts.metrics, paths=_plain_paths(app))


def public_paths(parts: Parts) -> frozenset[str]:
    """Return the exact paths that need no key."""
    security = parts.settings.security
    metrics = {"/metrics"} if security.metrics_public else set()
    docs = {_DOCS_URL, _OPENAPI_URL} if security.docs else set()
    return ops.PUBLIC_PATHS | metrics | docs


def _plain_paths(app: FastAPI) -> frozenset[str]:
    return frozenset(route.path for route in iter_route_contexts(app.routes) if route.path and "{" not in route.path)


def _cors(origins: tuple[str, ...]) -> dict[str, Any]:
    """Without credentials: keys travel in a header that the page sets itself, so no visitor's key is sent unasked."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST", "PUT", "PATCH", "DELETE"],
        "allow_headers": [
            "Authorization",
            "Cache-Control",
            "Content-Type",
            "X-API-Key",
            "X-Request-ID",
            "X-Session-ID",
        ],
        "expose_headers": [
            "Retry-After",
            "X-Cache",
            "X-Process-Time",
            "X-Request-ID",
            *(
                f"x-ratelimit-{what}-{kind}"
                for what in ("limit", "remaining", "reset")
                for kind in ("requests", "tokens")
            ),
        ],
    }
