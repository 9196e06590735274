"""GET /v1/models: model cards with the fields of both vLLM and llama.cpp."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from fastapi import APIRouter
from typing_extensions import TypedDict

from app.embeddings import EmbeddingInfo
from app.engine.base import EngineInfo, HostedEngine
from app.engine.served_model import ServedEncoder
from app.errors import EngineNotReady, InternalError, ModelNotFound, RateLimited, Unauthorized
from app.types import EngineState
from app.web.http.dependencies import CallerDep, Container, ContainerDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictRoute
from app.web.openai.errors import ERROR_FORMAT

router = APIRouter(prefix="/v1/models", tags=["openai"], route_class=StrictRoute)

_ERRORS = error_responses(Unauthorized, ModelNotFound, RateLimited, InternalError, error_format=ERROR_FORMAT)
_STATUS: Mapping[EngineState, Literal["loading", "loaded", "unloaded"]] = {
    EngineState.LOADING: "loading",
    EngineState.READY: "loaded",
    EngineState.UNRESPONSIVE: "loading",
    EngineState.RESTARTING: "loading",
    EngineState.FAILED: "unloaded",
    EngineState.CLOSED: "unloaded",
}
"""Engine state -> llama.cpp's status value."""


class Modalities(TypedDict):
    """What goes in and comes out."""

    input_modalities: list[str]
    output_modalities: list[str]


class Quantization(TypedDict):
    """How the weights were quantized, and by how much that changes log-probabilities."""

    method: str
    logprob_shift: float


class ModelStatus(TypedDict):
    """Whether the model can be used."""

    value: Literal["loading", "loaded", "unloaded"]
    failed: bool


class EmbeddingFacts(TypedDict):
    """How the model embeds texts."""

    dimension: int
    dimensions: list[int] | None
    """Shorter lengths that vectors may be cut to: an empty list allows any, null none."""
    max_tokens: int
    pooling: list[str]
    normalized: bool
    prompts: list[str]


class ModelCard(TypedDict):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    """Of an adapter: the model that it is applied to."""
    max_model_len: int | None
    quantization: Quantization | None
    permission: list[Any]
    architecture: Modalities
    status: ModelStatus
    embedding: NotRequired[EmbeddingFacts]
    """Of a model that embeds, once it is loaded."""


class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[ModelCard]


@router.get("", responses=_ERRORS)
async def models(container: ContainerDep) -> ModelList:
    """List the models and their adapters, those models too that are loaded when a request names them."""
    names = dict.fromkeys([*container.host.names, *container.loader.known, *_adapter_names(container)])
    return {"object": "list", "data": [_card(name, container) for name in names]}


# A model of the hub has a slash in its name.
@router.get("/{model:path}", responses=_ERRORS)
async def model(model: str, container: ContainerDep, caller: CallerDep) -> ModelCard:
    """Describe one model."""
    host = container.host
    if model not in _adapter_names(container) and (model not in container.loader.known or model in host.names):
        host.find(model, allowed=caller.rights.models)
    return _card(model, container)


def _adapter_names(container: Container) -> list[str]:
    """Return the adapters of the models that are loaded, or that a request can have loaded."""
    models = {*container.host.loaded, *container.loader.known}
    return [each.name for each in container.host.adapters.entries if each.model in models]


def _card(name: str, container: Container) -> ModelCard:
    adapter = next((each for each in container.host.adapters.entries if each.name == name), None)
    model = adapter.model if adapter else name
    served = next((each for each in container.host.models if each.name == model), None)
    state = EngineState.CLOSED if served is None else served.engine.status().state
    if served is None and model in container.loader.loads:
        state = EngineState.LOADING
    if adapter is not None and adapter.problem is not None:
        state = EngineState.FAILED
    since = adapter.adapter.since if adapter and adapter.adapter else container.host.since
    info = None if served is None else _info(served.engine)
    output = "embeddings" if isinstance(served, ServedEncoder) else "text"
    card: ModelCard = {
        "id": name,
        "object": "model",
        "created": since,
        "owned_by": "llm-service",
        "root": adapter.shown_source if adapter else name,
        "parent": adapter.model if adapter else None,
        "max_model_len": info.context_length if info else None,
        "quantization": _quantization(info),
        "permission": [],
        "architecture": {"input_modalities": ["text"], "output_modalities": [output]},
        "status": {"value": _STATUS[state], "failed": state is EngineState.FAILED},
    }
    if info is not None and info.embedding is not None and adapter is None:
        card["embedding"] = _embedding(info.embedding)
    return card


def _info(engine: HostedEngine) -> EngineInfo | None:
    """Return None until the model is loaded."""
    try:
        return engine.info
    except EngineNotReady:
        return None


def _embedding(info: EmbeddingInfo) -> EmbeddingFacts:
    return {
        "dimension": info.dimension,
        "dimensions": None if info.dimensions is None else list(info.dimensions),
        "max_tokens": info.max_tokens,
        "pooling": list(info.pooling),
        "normalized": info.normalized,
        "prompts": [name for name, _ in info.prompts],
    }


def _quantization(info: EngineInfo | None) -> Quantization | None:
    """Return the quantization and its log-probability error; None for an unquantized model."""
    if info is None or info.logprob_shift is None:
        return None
    return {"method": "int8", "logprob_shift": info.logprob_shift}
