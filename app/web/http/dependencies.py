"""FastAPI dependencies of the routes as annotated aliases: the application's objects, caller and request context.

`create_app` fills the `Container` once.  Every dependency is a coroutine, because FastAPI runs a plain function in a
thread, which costs more than the function itself.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Protocol
from uuid import uuid4

from fastapi import Depends, Request

from app.access.access import Access
from app.config import Settings
from app.engine.host import EngineRegistry
from app.errors import Forbidden, NotFound
from app.generation.requests import ChatAsk, CompletionAsk, Event, Origin
from app.generation.sessions import SessionStore
from app.telemetry import Metrics
from app.types import Principal
from app.web.http.authentication import Keys
from app.web.http.private_api import route_path
from app.web.http.rate_limits import RateLimits


class Service(Protocol):
    """The part of `GenerationService` that the web layer calls."""

    @property
    def sessions(self) -> SessionStore | None:
        """The session store, or None if session memory is switched off."""

    def complete(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        """Complete a plain text; closing the generator cancels the generation."""

    def chat(self, ask: ChatAsk) -> AsyncGenerator[Event, None]:
        """Reply to the last message of a conversation; closing the generator cancels the generation."""

    async def status(self) -> Mapping[str, Any]:
        """Return the metrics of GET /status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The objects that routes and middleware work with, built once per application."""

    settings: Settings
    service: Service
    engines: EngineRegistry
    keys: Keys
    access: Access
    limits: RateLimits
    metrics: Metrics


async def _container(request: Request) -> Container:
    container: Container = request.app.state.container
    return container


ContainerDep = Annotated[Container, Depends(_container)]


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


CallerDep = Annotated[Principal, Depends(_caller)]
"""The principal that the authentication middleware identified."""


async def _admin(caller: CallerDep) -> Principal:
    if not caller.rights.manage_keys:
        raise Forbidden("This needs an API key whose role may manage keys.")
    return caller


AdminDep = Annotated[Principal, Depends(_admin)]
"""A caller who may manage keys and roles and see everybody's usage."""


async def _access(container: ContainerDep) -> Access:
    return container.access


AccessDep = Annotated[Access, Depends(_access)]


async def _service(container: ContainerDep) -> Service:
    return container.service


ServiceDep = Annotated[Service, Depends(_service)]


async def _sessions(service: ServiceDep) -> SessionStore:
    if service.sessions is None:
        raise NotFound("Session memory is switched off on this service.")
    return service.sessions


SessionsDep = Annotated[SessionStore, Depends(_sessions)]


def bind_end_user(request: Request, name: str | None) -> None:
    """Add a hash of the caller's end user to the request's log line; the name itself is never logged."""
    if name is not None:
        principal: Principal = request.state.principal
        request.state.end_user = sha256(f"{principal.tenant}\0{name}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What a generating route needs beside its body."""

    caller: Principal
    request_id: str
    """The id that the client sees, and may have chosen itself."""
    generation_id: str
    """The engine's id: always fresh, since a client may use one request id for concurrent requests."""
    origin: Origin
    may_cache: bool
    """False if the client's Cache-Control forbids a cached response."""
    max_prompt_chars: int


async def _request_context(request: Request, container: ContainerDep, caller: CallerDep) -> RequestContext:
    directives = {item.strip().lower() for line in request.headers.getlist("cache-control") for item in line.split(",")}
    return RequestContext(
        caller=caller,
        request_id=request.state.request_id,
        generation_id=f"gen_{uuid4().hex}",
        origin=Origin(request_id=request.state.request_id, route=route_path(request.scope) or ""),
        may_cache=not directives & {"no-cache", "no-store"},
        max_prompt_chars=container.settings.security.max_prompt_chars,
    )


RequestContextDep = Annotated[RequestContext, Depends(_request_context)]
