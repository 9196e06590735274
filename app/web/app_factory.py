"""Builds the FastAPI application from a container: routes, error formats of the dialects, middlewares in order."""

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Lifespan

from app import __version__
from app.web.admin import adapters, documentation, health, keys, models, roles, usage
from app.web.compat.routers import ROUTERS as COMPAT_ROUTERS
from app.web.http.authentication import Authentication
from app.web.http.body_limits import BodyLimits
from app.web.http.cors import CrossOriginAccess
from app.web.http.dependencies import Container
from app.web.http.errors import DEFAULT_FORMAT, ErrorRenderer
from app.web.http.json_body import GeneratingRoute
from app.web.http.middleware import DrainGate, ErrorBoundary, HeadChecks, RequestLog
from app.web.http.openapi import DESCRIPTION, DocumentedApp
from app.web.http.private_api import served_methods
from app.web.native import batch, chat, generate, sessions
from app.web.openai import batches as openai_batches
from app.web.openai import chat as openai_chat
from app.web.openai import completions as openai_completions
from app.web.openai import embeddings as openai_embeddings
from app.web.openai import errors as openai_errors
from app.web.openai import files as openai_files
from app.web.openai import models as openai_models
from app.web.openai import tokenize as openai_tokenize
from app.web.openai.responses import routes as openai_responses
from app.web.page import routes as page

UPLOAD_PATHS = ("/v1/files", "/v1/batches")
FORM_BYTES = 16 * 1024
"""Bytes of a form around its file."""


def build_app(container: Container, *, lifespan: Lifespan[FastAPI] | None = None) -> DocumentedApp:
    """Return the application around the objects of the container."""
    docs = container.settings.serves_docs
    native = [module.router for module in (generate, batch, chat, sessions, adapters, keys, roles, usage, models)]
    dialect = (
        openai_chat,
        openai_completions,
        openai_embeddings,
        openai_responses,
        openai_files,
        openai_batches,
        openai_models,
        openai_tokenize,
    )
    openai = [module.router for module in dialect]
    openai += [openai_responses.stored_router, openai_files.upload_router, openai_batches.creating_router]
    compat = COMPAT_ROUTERS if container.settings.compat.enabled else ()
    # The page's `/` is for browsers only, and stands before that of programs.
    pages = [*([page.router] if container.settings.security.page else []), *([documentation.router] if docs else [])]
    routers = (*native, *openai, *compat, *pages, health.router)
    app = DocumentedApp(
        title=container.settings.app.name,
        version=__version__,
        description=DESCRIPTION,
        routes=_in_order_of_use(routers),
        openapi_url=documentation.OPENAPI_PATH if docs else None,
        # Its own pages load their scripts from other hosts.
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # A redirect would contain the client's Host header.
        redirect_slashes=False,
        # Its log records contain what clients sent, and its spans take a tenth of a small request's time.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        lifespan=lifespan,
    )
    app.state.container = container
    openai_prefixes = (*openai_errors.PATH_PREFIXES, *_paths(openai))
    renderer = ErrorRenderer(
        dict.fromkeys(openai_prefixes, openai_errors.ERROR_FORMAT)
        | dict.fromkeys(_paths([*native, *compat]), DEFAULT_FORMAT)
    )
    renderer.register_handlers(app)
    app.renderer, app.always = renderer, health.ALWAYS_PATHS
    app.public, app.optional = public_paths(container), optional_paths(container)
    _add_middlewares(app, container, renderer)
    return app


def _in_order_of_use(routers: Iterable[APIRouter]) -> list[BaseRoute]:
    """Return the routes with those first that generate, since a request tries one after the other.

    The routes themselves: `include_router` would analyse every endpoint again, for each application.
    """
    routes = [route for router in routers for route in router.routes]
    return sorted(routes, key=lambda route: not isinstance(route, GeneratingRoute))


def _paths(routers: Iterable[APIRouter]) -> list[str]:
    return [route.path for router in routers for route in router.routes if isinstance(route, APIRoute)]


def _add_middlewares(app: FastAPI, container: Container, renderer: ErrorRenderer) -> None:
    """Add the middlewares, innermost first; `middleware.py` explains the order."""
    security = container.settings.security
    app.add_middleware(
        Authentication,
        keys=container.keys,
        failed_keys=container.failed_keys,
        metrics=container.metrics,
        public=public_paths(container),
        optional=optional_paths(container),
    )
    app.add_middleware(DrainGate, host=container.host, always=health.ALWAYS_PATHS)
    app.add_middleware(HeadChecks, hosts=security.allowed_hosts, any_host=health.ALWAYS_PATHS)
    app.add_middleware(ErrorBoundary, renderer=renderer)
    app.add_middleware(
        BodyLimits,
        max_bytes=security.max_body_bytes,
        timeout_seconds=security.body_timeout_seconds,
        uploads=dict.fromkeys(UPLOAD_PATHS, container.settings.batches.max_file_bytes + FORM_BYTES),
    )
    if security.cors_origins:
        app.add_middleware(CrossOriginAccess, origins=security.cors_origins)
    app.add_middleware(
        RequestLog,
        metrics=container.metrics,
        served=served_methods(app),
        tracer=container.tracer,
        untraced=health.ALWAYS_PATHS,
    )


def public_paths(container: Container) -> frozenset[str]:
    """Return the exact paths that need no key."""
    security = container.settings.security
    metrics = {"/metrics"} if security.metrics_public else set()
    docs = documentation.PUBLIC_PATHS if container.settings.serves_docs else frozenset()
    pages = page.public_paths() if security.page else frozenset()
    return health.PUBLIC_PATHS | metrics | docs | pages


def optional_paths(container: Container) -> frozenset[str]:
    """Return the exact paths that need no key, but say more to a caller with one."""
    return frozenset(["/status"] if container.settings.security.status_public else [])
