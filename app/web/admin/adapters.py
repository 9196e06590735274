"""/v1/adapters: LoRA adapters, loaded and unloaded while the service runs, for callers who may load models."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints

from app.engine.adapters import Adapter
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

AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,255}$")]


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


class AdapterResponse(BaseModel):
    """An adapter."""

    adapter_name: str
    state: Literal["loaded", "unloaded"]
    model: str
    """The model that it is applied to."""
    source: str
    digest: str
    """SHA-256 of its configuration and its weights."""
    rank: int
    parameters: int
    trained_on: str | None
    """The model that its configuration names; nothing follows from that but a look at the sizes of the layers."""

    @classmethod
    def of(cls, adapter: Adapter, state: Literal["loaded", "unloaded"]) -> "AdapterResponse":
        facts = adapter.facts
        return cls(
            adapter_name=adapter.name,
            state=state,
            model=adapter.model,
            source=adapter.source,
            digest=facts.digest,
            rank=facts.rank,
            parameters=facts.parameters,
            trained_on=facts.base,
        )


@router.post("/load", responses=error_responses(*_REFUSALS, ModelNotFound, EngineFailed, ShuttingDown))
async def load(body: LoadAdapterRequest, caller: LoadModelsDep, container: ContainerDep) -> AdapterResponse:
    """Load an adapter; requests can name it as soon as this is answered."""
    adapter = await container.host.load_adapter(body.adapter_name, body.source, body.model)
    return AdapterResponse.of(adapter, "loaded")


@router.post("/unload", responses=error_responses(*_REFUSALS, AdapterNotFound))
async def unload(body: UnloadAdapterRequest, caller: LoadModelsDep, container: ContainerDep) -> AdapterResponse:
    """Unload an adapter: requests that use it may end within adapters.grace_seconds; its memory is free afterwards."""
    return AdapterResponse.of(await container.host.adapters.unload(body.adapter_name), "unloaded")
