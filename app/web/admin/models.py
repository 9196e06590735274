"""POST /v1/models/load and /v1/models/unload: models come and go at run time, for callers who may load them."""

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel, Field, PositiveInt, StringConstraints
from starlette.responses import Response as HttpResponse

from app.config import ModelConfig, beside
from app.config.embeddings import EmbeddingPooling
from app.config.model import SERVED_NAME, CompileName, DeviceName, DtypeName, QuantizationName, ServedName
from app.engine.model_load import Load
from app.engine.model_source import LoadSpec, Task, task_of
from app.engine.model_states import ModelState, State, model_state
from app.engine.source_policy import check_source
from app.errors import InvalidRequest, ModelNotFound
from app.web.http.dependencies import Container, ContainerDep, LoadModelsDep
from app.web.http.errors import as_app_error, envelope
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.model_loading import LOAD_ERRORS, UNLOAD_ERRORS, HubToken, revealed
from app.web.http.sse import FrameStream, frame, streamed

MAX_GRACE_SECONDS = 3600
MAX_NUMBER = 2**31 - 1
GENERATES_ONLY = ("engine", "quantization", "compile", "embeddings", "max_batch_size")
"""Fields that a model which only embeds does not have."""

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=StrictRoute)

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/@:~ +-]{1,512}$")]
_Revision = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{1,256}$")]
_Number = Annotated[PositiveInt, Field(le=MAX_NUMBER)]


class LoadModel(StrictModel):
    """What to load; what is left out is taken from the configuration's section `model`."""

    model_name: ModelName = Field(
        description="The name of a configured model, or with `source` a hub id, a folder or a registry URI."
    )
    source: Literal["hub", "local", "mlflow"] | None = None
    served_name: ServedName | None = Field(None, description="The name that requests use; null: the id or the folder.")
    revision: _Revision | None = Field(None, description="Commit, branch or tag on the hub.")
    hf_token: HubToken | None = Field(
        None, description="For a gated model of the hub: used for this load and then forgotten."
    )
    engine: Literal["auto", "batching", "serial", "echo"] | None = Field(
        None, description="How it is computed; echo repeats the prompt, to try clients."
    )
    device: DeviceName | None = None
    dtype: DtypeName | None = None
    quantization: QuantizationName | None = None
    compile: CompileName | None = None
    embeddings: EmbeddingPooling | None = None
    task: Task | None = Field(
        None, description="What it is for: null is what the files of a folder say, and to generate for other sources."
    )
    max_model_len: _Number | None = None
    max_batch_size: _Number | None = None
    replace: bool = Field(False, description="Take the place of a model of this name as soon as the new one serves.")
    stream: bool = Field(False, description="Send the progress as events `progress`, then `done` or `error`.")

    def config(self, defaults: ModelConfig) -> ModelConfig:
        """Return the configuration of the model."""
        unrelated = {"model_name", "hf_token", "task", "replace", "stream"}
        fields = self.model_dump(exclude=unrelated, exclude_none=True)
        return beside(defaults, name=self.model_name, **fields)


class UnloadModel(StrictModel):
    """Which model to unload."""

    model_name: ModelName = Field(description="The name that requests use.")
    grace_seconds: Annotated[float, Field(ge=0, le=MAX_GRACE_SECONDS)] | None = Field(
        None, description="How long running requests may take; null is what is configured."
    )


class LoadProgressFields(BaseModel):
    """How far a load has come."""

    stage: str
    bytes_done: int | None
    bytes_total: int | None


class ModelStateResponse(BaseModel):
    """One model, loaded or not."""

    name: str
    state: State
    task: Literal["generate", "embed"]
    default: bool
    device: str | None
    dtype: str | None
    revision: str | None
    memory_bytes: int | None
    device_memory_bytes: int | None
    device_memory_total_bytes: int | None
    slots: int | None
    running: int
    waiting: int
    requests: int
    restarts: int
    progress: LoadProgressFields | None
    last_error: str | None
    error_reason: str | None
    adapters: list[str]
    """Those that requests can name."""
    refused_adapters: dict[str, str]
    """Adapters of its name that it could not be loaded with, and why."""

    @classmethod
    def of(cls, state: ModelState) -> "ModelStateResponse":
        return cls.model_validate(asdict(state))


@router.post(
    "/load",
    response_model=ModelStateResponse,
    responses=LOAD_ERRORS | streamed("progress", "done", "error"),
)
async def load_model(
    body: LoadModel, caller: LoadModelsDep, request: Request, container: ContainerDep
) -> ModelStateResponse | HttpResponse:
    """Load a model; any number of requests for the same one share a load, which goes on when they hang up."""
    spec = await _spec(body, container)
    loader = container.loader
    load = loader.replace(spec) if body.replace and spec.name in container.host.loaded else loader.load(spec)
    if body.stream:
        return FrameStream(_frames(load, container, request.state.request_id))
    await load.wait()
    return _state(spec.name, container)


@router.post("/unload", response_model=ModelStateResponse, responses=UNLOAD_ERRORS)
async def unload_model(body: UnloadModel, caller: LoadModelsDep, container: ContainerDep) -> ModelStateResponse:
    """Unload a model once its running requests have ended, or end its load; requests that name it get 404."""
    await container.loader.unload(body.model_name, body.grace_seconds)
    return _state(body.model_name, container)


async def _spec(body: LoadModel, container: Container) -> LoadSpec:
    """Raises: Forbidden: it may not be loaded; ModelNotFound: no model of this name is configured; ModelLoadFailed."""
    if body.source is None:
        if (known := container.loader.configured.get(body.model_name)) is None:
            raise ModelNotFound("No model of this name is configured; say by `source` where it comes from.")
        return known
    settings = container.settings.model
    # A thread: the folder may be on a slow disk.
    config = await asyncio.to_thread(check_source, body.config(settings), settings)
    name = config.served_name or config.own_name
    if not re.fullmatch(SERVED_NAME, name):
        raise InvalidRequest.of_field("served_name", "is needed, since the model's own name has other signs")
    return LoadSpec(name=name, config=config, task=await _task(body, config), hub_token=revealed(body.hf_token))


async def _task(body: LoadModel, config: ModelConfig) -> Task:
    """Return what a model is loaded for.

    Raises: InvalidRequest: a model that only embeds cannot be loaded as the request says.
    """
    found: Task = "generate"
    if body.task is None and config.source == "local":
        found = await asyncio.to_thread(task_of, Path(config.name))
    task = body.task or found
    if task == "embed":
        for name in GENERATES_ONLY:
            if getattr(body, name) is not None:
                raise InvalidRequest.of_field(name, "is for models that generate, and this one only embeds texts")
        if config.source == "mlflow":
            raise InvalidRequest.of_field("task", "must be generate for a model of a registry")
    return task


async def _frames(load: Load, container: Container, request_id: str) -> AsyncGenerator[bytes, None]:
    async for progress in load.updates():
        yield frame({"status": "loading", **asdict(progress)}, "progress")
    try:
        await load.wait()
        yield frame(jsonable_encoder(_state(load.spec.name, container)), "done")
    except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
        yield frame(envelope(as_app_error(error), request_id), "error")


def _state(name: str, container: Container) -> ModelStateResponse:
    return ModelStateResponse.of(model_state(name, container.host, container.loader))
