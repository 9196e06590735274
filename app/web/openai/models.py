"""GET /v1/models: what can be asked for.  vLLM's and llama.cpp's card fields together."""

from typing import Any

from fastapi import APIRouter

from app.engine.base import Engine, EngineInfo
from app.errors import EngineNotReady, InternalError, ModelNotFound, RateLimited, Unauthorized
from app.types import EngineState
from app.web.http.dependencies import Parts, PartsDep
from app.web.http.errors import document
from app.web.http.json_body import StrictRoute

router = APIRouter(prefix="/v1/models", tags=["openai"], route_class=StrictRoute)

_ERRORS = document(Unauthorized, ModelNotFound, RateLimited, InternalError, speaks_openai=True)
_STATUS = {
    EngineState.LOADING: "loading",
    EngineState.READY: "loaded",
    EngineState.RESTARTING: "loading",
    EngineState.FAILED: "unloaded",
    EngineState.CLOSED: "unloaded",
}
"""llama.cpp's words."""


@router.get("", responses=_ERRORS)
async def models(parts: PartsDep) -> dict[str, Any]:
    """List the models."""
    return {"object": "list", "data": [_card(name, parts) for name in parts.engines.names]}


# A model of the hub has a slash in its name.
@router.get("/{model:path}", responses=_ERRORS)
async def model(model: str, parts: PartsDep) -> dict[str, Any]:
    """Describe one model."""
    parts.engines.find(model)
    return _card(model, parts)


def _card(name: str, parts: Parts) -> dict[str, Any]:
    engine = parts.engines.find(name)
    state, info = engine.status().state, _info(engine)
    return {
        "id": name,
        "object": "model",
        "created": parts.engines.since,
        "owned_by": "llm-service",
        "root": name,
        "parent": None,
        "max_model_len": info.context_length if info else None,
        "quantization": _quantization(info),
        "permission": [],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "status": {"value": _STATUS[state], "failed": state is EngineState.FAILED},
    }


def _info(engine: Engine) -> EngineInfo | None:
    """Return None as long as nothing is known of the model."""
    try:
        return engine.info
    except EngineNotReady:
        return None


def _quantization(info: EngineInfo | None) -> dict[str, Any] | None:
    """Tell how far log-probabilities are from the model's own; None where it computes as it was made."""
    if info is None or info.logprob_shift is None:
        return None
    return {"method": "int8", "logprob_shift": info.logprob_shift}
