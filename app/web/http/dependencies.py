"""What a route may ask for: the objects of the application and the caller, as annotated aliases.

Decides nothing.  `Parts` is filled once by `create_app`; `Service` says what the web layer needs of it.
Every dependency is a coroutine, because FastAPI runs a plain function in a thread, which costs more than it does.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Protocol
from uuid import uuid4

from fastapi import Depends, Request

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.config import Settings
from app.engine.host import EngineRegistry
from app.errors import Forbidden, NotFound
from app.generation.requests import ChatAsk, CompletionAsk, Event, Origin
from app.generation.sessions import SessionStore
from app.telemetry import Metrics
from app.types import Principal
from app.web.http.authentication import Keys
from app.web.http.rate_limits import FailedKeyLimiter


class Service(Protocol):
    """The way from a prompt to text; `GenerationService` is it."""

    @property
    def sessions(self) -> SessionStore | None:
        """None: session memory is switched off."""

    def complete(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        """Go on with a plain text; closing the generator cancels."""

    def chat(self, ask: ChatAsk) -> AsyncGenerator[Event, None]:
        """Answer the last message of a conversation; closing the generator cancels."""

    async def status(self) -> Mapping[str, Any]:
        """Figures for GET /status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The objects that the web layer works with, built once for each application."""

    settings: Settings
    service: Service
    engines: EngineRegistry
    keys: Keys
    access: AccessControl
    admission: AdmissionControl
    failed_keys: FailedKeyLimiter
    metrics: Metrics


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


CallerDep = Annotated[Principal, Depends(_caller)]
"""The owner of the key; the authentication middleware has let nobody else through."""


async def _admin(caller: CallerDep) -> Principal:
    if not caller.rights.manage_keys:
        raise Forbidden("This needs an API key whose role may manage keys.")
    return caller


AdminDep = Annotated[Principal, Depends(_admin)]
"""A caller who may manage keys, roles and see everybody's usage."""


async def _access(parts: PartsDep) -> AccessControl:
    return parts.access


AccessDep = Annotated[AccessControl, Depends(_access)]


async def _service(parts: PartsDep) -> Service:
    return parts.service


ServiceDep = Annotated[Service, Depends(_service)]


async def _sessions(service: ServiceDep) -> SessionStore:
    if service.sessions is None:
        raise NotFound("Session memory is switched off on this service.")
    return service.sessions


SessionsDep = Annotated[SessionStore, Depends(_sessions)]


def note_end_user(request: Request, name: str | None) -> None:
    """Let the log tell the caller's end users apart without naming them."""
    if name is not None:
        principal: Principal = request.state.principal
        request.state.end_user = sha256(f"{principal.tenant}\0{name}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a generating route needs beside its body."""

    caller: Principal
    request_id: str
    """The id that the client sees, and may have chosen itself."""
    ask_id: str
    """The engine's id: always fresh, since a client may send one request id twice at once."""
    origin: Origin
    may_cache: bool
    """False: the client's Cache-Control asks for an answer made anew."""
    max_prompt_chars: int


async def _call(request: Request, parts: PartsDep, caller: CallerDep) -> Call:
    asked = {word.strip().lower() for line in request.headers.getlist("cache-control") for word in line.split(",")}
    return Call(
        caller=caller,
        request_id=request.state.request_id,
        ask_id=f"gen_{uuid4().hex}",
        origin=Origin(request_id=request.state.request_id, route=request.scope["route"].path),
        may_cache=not asked & {"no-cache", "no-store"},
        max_prompt_chars=parts.settings.security.max_prompt_chars,
    )


CallDep = Annotated[Call, Depends(_call)]
