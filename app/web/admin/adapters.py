"""/v1/adapters: LoRA adapters, loaded and unloaded while the service runs, for callers who may load models."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from app.config.adapters import AdapterName
from app.engine.adapters import AdapterEntry
from app.errors import (
    AdapterNotFound,
    Conflict,
    EngineFailed,
    EngineNotReady,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    ShuttingDown,
    Unauthorized,
)
from app.web.http.dependencies import ContainerDep, LoadModelsDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=StrictRoute)

_REFUSALS = (InvalidRequest, Unauthorized, Forbidden, Conflict, RateLimited, InternalError, EngineNotReady)


class LoadAdapterRequest(StrictModel):
    """An adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""

    adapter_name: AdapterName = Field(description="Requests use it as their model.")
    source: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = Field(
        description="A folder below adapters.roots, relative to one of them or absolute."
    )
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="The model that the adapter is for; null: the default one."
    )


class UnloadAdapterRequest(StrictModel):
    """The adapter to unload."""

    adapter_name: AdapterName


AdapterState = Literal["loaded", "unloaded", "failed"]


class AdapterResponse(BaseModel):
    """An adapter; what only its files say is null while it is not loaded."""

    adapter_name: str
    state: AdapterState
    model: str
    """The model that it is applied to."""
    source: str
    digest: str | None
    """SHA-256 of its configuration and its weights."""
    rank: int | None
    parameters: int | None
    trained_on: str | None
    """The model that its configuration names; nothing follows from that but a look at the sizes of the layers."""
    problem: str | None
    """Why the model that serves now does not have it."""

    @classmethod
    def of(cls, entry: AdapterEntry, state: AdapterState) -> "AdapterResponse":
        facts = None if entry.adapter is None else entry.adapter.facts
        return cls(
            adapter_name=entry.name,
            state=state,
            model=entry.model,
            source=entry.shown_source,
            digest=None if facts is None else facts.digest,
            rank=None if facts is None else facts.rank,
            parameters=None if facts is None else facts.parameters,
            trained_on=None if facts is None else facts.base,
            problem=entry.problem,
        )


class AdapterList(BaseModel):
    """All adapters."""

    adapters: list[AdapterResponse]


@router.get("", responses=error_responses(Unauthorized, Forbidden, RateLimited, InternalError))
async def adapters(caller: LoadModelsDep, container: ContainerDep) -> AdapterList:
    """List the adapters, also those that are loaded with their model, or that it could not be loaded with."""
    return AdapterList(adapters=[AdapterResponse.of(entry, _state(entry)) for entry in container.host.adapters.entries])


@router.post("/load", responses=error_responses(*_REFUSALS, ModelNotFound, EngineFailed, ShuttingDown))
async def load(body: LoadAdapterRequest, caller: LoadModelsDep, container: ContainerDep) -> AdapterResponse:
    """Load an adapter; requests can name it as soon as this is answered."""
    entry = await container.host.load_adapter(body.adapter_name, body.source, body.model)
    return AdapterResponse.of(entry, "loaded")


@router.post("/unload", responses=error_responses(*_REFUSALS, AdapterNotFound))
async def unload(body: UnloadAdapterRequest, caller: LoadModelsDep, container: ContainerDep) -> AdapterResponse:
    """Unload an adapter: requests that use it may end within adapters.grace_seconds; its memory is free afterwards."""
    return AdapterResponse.of(await container.host.adapters.unload(body.adapter_name), "unloaded")


def _state(entry: AdapterEntry) -> AdapterState:
    return "loaded" if entry.adapter is not None else "failed" if entry.problem is not None else "unloaded"
