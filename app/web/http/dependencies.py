"""FastAPI dependencies of the routes as annotated aliases: the application's objects, caller and request context.

`create_app` fills the `Container` once.  Every dependency is a coroutine, because FastAPI runs a plain function in a
thread, which costs more than the function itself.
"""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Annotated, Any, Protocol
from uuid import uuid4

from fastapi import Depends, Request

from app.access.access import AccessControl
from app.access.admission import AdmissionControl, Admitted
from app.config import Settings
from app.embeddings import EmbeddingRequest
from app.engine.base import EngineInfo
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.registered_models import RegisteredModels
from app.errors import Forbidden, NotFound
from app.events import Event
from app.generation.batch_runner import BatchRunner
from app.generation.embedding import EmbeddingService
from app.generation.responses import ResponseStore
from app.generation.sessions import SessionStore
from app.requests import GenerationRequest, Origin
from app.stores.redis_connection import RedisConnection
from app.telemetry import Metrics
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import Message, Principal, Tenant
from app.web.http.authentication import Keys
from app.web.http.grammar_field import check_tools, named_by_field
from app.web.http.private_api import route_path
from app.web.http.rate_limits import FailedKeyLimiter

ADMITTED = "admitted"
"""Key in a generating request's state: the `Admitted` that it is."""
GRAMMAR_FIELD = "grammar_field"
"""Key in a generating request's state: the field that its grammar comes from, as `remember_grammar` takes it."""
BASE_PRIORITY = "base_priority"
"""Key in a generating request's state: what is added to the priority that its body names; 0 where it is not there."""


class Service(Protocol):
    """The part of `GenerationService` that the web layer calls."""

    def generate(self, request: GenerationRequest, principal: Principal) -> AsyncGenerator[Event, None]:
        """Generate; closing the generator cancels the generation."""

    async def storable(self, tenant: Tenant, messages: Sequence[Message]) -> list[Message]:
        """Return messages as they may be stored: masked, whatever the filters let through."""

    def status(self) -> Mapping[str, Any]:
        """Return the figures of GET /status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """The objects that routes and middleware work with, built once per application."""

    settings: Settings
    service: Service
    embeddings: EmbeddingService
    host: ModelHost
    loader: ModelLoader
    registered: RegisteredModels | None
    """None if no registry is configured."""
    sessions: SessionStore | None
    """None if session memory is switched off."""
    responses: ResponseStore | None
    """None under the same condition."""
    batches: BatchRunner | None
    """None if batches are switched off."""
    keys: Keys
    access: AccessControl
    admission: AdmissionControl
    failed_keys: FailedKeyLimiter
    redis: RedisConnection | None
    """None if no Redis is configured."""
    metrics: Metrics
    tracer: Tracer = NO_TRACER
    began: float = field(default_factory=time.monotonic)
    """When it was built, in seconds of a clock that nobody sets."""


async def _container(request: Request) -> Container:
    container: Container = request.app.state.container
    return container


ContainerDep = Annotated[Container, Depends(_container)]


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


CallerDep = Annotated[Principal, Depends(_caller)]
"""The principal that the authentication middleware identified."""


async def _caller_if_known(request: Request) -> Principal | None:
    principal: Principal | None = getattr(request.state, "principal", None)
    return principal


CallerIfKnownDep = Annotated[Principal | None, Depends(_caller_if_known)]
"""The caller of a route that needs no key; None for one that sent none."""


async def _admin(caller: CallerDep) -> Principal:
    if not caller.rights.manage_keys:
        raise Forbidden("This needs an API key whose role may manage keys.")
    return caller


AdminDep = Annotated[Principal, Depends(_admin)]
"""A caller who may manage keys and roles and see everybody's usage."""


async def _loading_caller(caller: CallerDep) -> Principal:
    if not (caller.rights.load_models or caller.rights.manage_keys):
        raise Forbidden("This needs an API key whose role may load models.")
    return caller


LoadModelsDep = Annotated[Principal, Depends(_loading_caller)]
"""A caller who may load and unload models and adapters."""


async def _access(container: ContainerDep) -> AccessControl:
    return container.access


AccessDep = Annotated[AccessControl, Depends(_access)]


async def _sessions(container: ContainerDep) -> SessionStore:
    if container.sessions is None:
        raise NotFound("Session memory is switched off on this service.")
    return container.sessions


SessionsDep = Annotated[SessionStore, Depends(_sessions)]


async def _responses(container: ContainerDep) -> ResponseStore:
    if container.responses is None:
        raise NotFound("Session memory is switched off on this service, and with it stored responses.")
    return container.responses


ResponsesDep = Annotated[ResponseStore, Depends(_responses)]


async def _batches(container: ContainerDep) -> BatchRunner:
    if container.batches is None:
        raise NotFound("Files and batches are switched off on this service.")
    return container.batches


BatchesDep = Annotated[BatchRunner, Depends(_batches)]


def bind_end_user(request: Request, name: str | None) -> None:
    """Add a hash of the caller's end user to the request's log line; the name itself is never logged."""
    if name is not None:
        principal: Principal = request.state.principal
        # The repr delimits the two, whatever characters they hold.
        described = repr((str(principal.tenant), name))
        request.state.end_user = sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Everything that a generating route takes beside its body."""

    request: Request
    container: Container

    @property
    def caller(self) -> Principal:
        principal: Principal = self.request.scope["state"]["principal"]
        return principal

    @property
    def request_id(self) -> str:
        """Return the id that the client sees, and may have chosen itself."""
        request_id: str = self.request.scope["state"]["request_id"]
        return request_id

    def generation(self, **fields: Any) -> GenerationRequest:
        """Return a request of this caller; its id is fresh, since a client may use one request id twice at once."""
        return GenerationRequest(
            id=f"gen_{uuid4().hex}",
            tenant=self.caller.tenant,
            origin=self._origin,
            **{**fields, "priority": self._base_priority + fields.get("priority", 0)},
        )

    def embedding(self, **fields: Any) -> EmbeddingRequest:
        """Return a request of this caller for vectors."""
        return EmbeddingRequest(
            id=f"embd_{uuid4().hex}",
            tenant=self.caller.tenant,
            origin=self._origin,
            priority=self._base_priority,
            **fields,
        )

    @property
    def _base_priority(self) -> int:
        base: int = self.request.scope["state"].get(BASE_PRIORITY, 0)
        return base

    @property
    def _origin(self) -> Origin:
        return Origin(request_id=self.request_id, route=route_path(self.request.scope) or "")

    @property
    def admitted(self) -> Admitted:
        """Return what the request occupies, which is told of what refuses it or a part of it."""
        admitted: Admitted = self.request.scope["state"][ADMITTED]
        return admitted

    @property
    def may_cache(self) -> bool:
        """Return False if the client's Cache-Control forbids a cached response."""
        lines = self.request.headers.getlist("cache-control")
        return not {item.strip().lower() for line in lines for item in line.split(",")} & {"no-cache", "no-store"}

    @property
    def max_prompt_chars(self) -> int:
        return self.container.settings.security.max_prompt_chars

    @property
    def ignores_unknown_fields(self) -> bool:
        """Return whether fields that cannot be honoured are left out and named."""
        return self.container.settings.openai.unknown_fields == "ignore"

    def model_info(self, model: str | None, adapter: str | None = None) -> EngineInfo:
        """Return the description of a model that generates, or of the default one for None; of one with an adapter,
        which either of the two may name, under the adapter's name.

        Raises: ModelNotFound, AdapterNotFound; InvalidRequest: it only embeds, or the two names contradict each other;
            EngineNotReady: it is not loaded yet.
        """
        host = self.container.host
        named = host.adapters.named_by(model, adapter)
        info = host.find_generating(named or model, allowed=self.caller.rights.models).engine.info
        loaded = host.adapters.get(named)
        return info if loaded is None else replace(info, model=loaded.name, revision=loaded.facts.digest)

    async def ensure_model(self, model: str | None, adapter: str | None = None) -> None:
        """Let a request wait for the model that it names, where the configuration says so.

        Raises: AdapterNotFound, InvalidRequest: the adapter is none, or none of the model; others as
            `ModelLoader.ensure`.
        """
        named = self.container.host.adapters.named_by(model, adapter)
        await self.container.loader.ensure(named or model, self.caller.rights.models)

    def events(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate for this caller.

        Raises: InvalidRequest: the request has both a grammar and a tool that must be called.
        """
        events = self.container.service.generate(request, self.caller)
        remembered: tuple[str, bool] | None = self.request.scope["state"].get(GRAMMAR_FIELD)
        if remembered is None or request.sampling.grammar is None:
            return events
        field, beside_required_tools = remembered
        if not beside_required_tools:
            check_tools(request, field)
        return named_by_field(events, field)

    def remember_grammar(self, field: str, *, beside_required_tools: bool = False) -> None:
        """Remember which field the grammar comes from.

        Args: beside_required_tools: whether it only says what a text would look like, where a tool must be called.
        """
        self.request.scope["state"][GRAMMAR_FIELD] = (field, beside_required_tools)


async def _request_context(request: Request, container: ContainerDep) -> RequestContext:
    return RequestContext(request, container)


RequestContextDep = Annotated[RequestContext, Depends(_request_context)]
