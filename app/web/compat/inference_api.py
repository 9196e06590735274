"""LLM Inference API: `parameters` on POST /generate, POST /load_model, /unload_model and /generate_apikey.

Its POST /generate shares the path with another system's; `generate.py` tells the two apart.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.config import ModelConfig, beside
from app.config.model import DeviceName
from app.engine.model_source import LoadSpec, task_of
from app.engine.served_model import ServedModel
from app.engine.source_policy import check_source
from app.errors import (
    AppError,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    RoleNotFound,
    StoreUnavailable,
    Unauthorized,
)
from app.events import DetokenizedLogprob, Response
from app.web.compat.completion_fields import Temperature, completion_request
from app.web.http.dependencies import AccessDep, AdminDep, Container, ContainerDep, LoadModelsDep, RequestContext
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.json_encoding import (
    JsonArray,
    LogprobsEncoder,
    SegmentedJsonResponse,
    encode_logprobs,
    exact_float,
)
from app.web.http.model_loading import LOAD_ERRORS, UNLOAD_ERRORS, HubToken, revealed
from app.web.http.owner_name import OwnerName
from app.web.http.sampling_params import SampleCount, StopTexts, TokenCount, TopP
from app.web.http.sse import collect_response

LoadableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/@:~ +-]{1,200}$")]

router = APIRouter(tags=["compat"], route_class=StrictRoute)


class GenerationParameters(StrictModel):
    """The sampling parameters, which this system nests in a field of their own."""

    temperature: Temperature | None = None
    max_new_tokens: TokenCount | None = None
    top_p: TopP | None = None
    num_return_sequences: SampleCount | None = None
    stop_sequences: StopTexts = None


class ScoredToken(TypedDict):
    """A generated token and its log-probability."""

    text: str
    logprob: float


class ScoredCompletion(TypedDict):
    """One completion with its tokens."""

    text: str
    tokens: list[ScoredToken]
    """Empty where the model or the caller's role has no log-probabilities."""


class CompletionsResponse(TypedDict):
    """All completions of a prompt."""

    success: Literal[True]
    request_time: float
    """Seconds."""
    completions: list[ScoredCompletion]


class _TokensEncoder(LogprobsEncoder):
    """Encodes the tokens of one completion."""

    def __init__(self) -> None:
        self.tokens = JsonArray()

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        self.tokens.extend([{"text": each.text, "logprob": exact_float(each.logprob)} for each in tokens])


async def complete(
    context: RequestContext,
    prompt: str,
    parameters: GenerationParameters,
    *,
    model: str | None,
    adapter: str | None,
) -> HttpResponse:
    """Complete a prompt; the response has the log-probability of every token, as far as there is one."""
    began = time.perf_counter()
    scored = context.caller.rights.raw_logprobs and _has_logprobs(context, model, adapter)
    request = completion_request(
        context,
        prompt,
        {
            "temperature": parameters.temperature,
            "max_tokens": parameters.max_new_tokens,
            "top_p": parameters.top_p,
            "stop": tuple(parameters.stop_sequences) if parameters.stop_sequences else None,
            "logprobs": 0 if scored else None,
        },
        model=model,
        adapter=adapter,
        n=parameters.num_return_sequences or 1,
        stream=False,
    )
    encoders = defaultdict[int, _TokensEncoder](_TokensEncoder)
    response = await collect_response(context.request, encode_logprobs(context.events(request), encoders))
    seconds = time.perf_counter() - began
    return SegmentedJsonResponse(
        {"success": True, "request_time": round(seconds, 6), "completions": _completions(response, encoders)}
    )


def _has_logprobs(context: RequestContext, model: str | None, adapter: str | None) -> bool:
    """Raises: as `RequestContext.model_info`."""
    return "logprobs" not in context.model_info(model, adapter).capabilities.unsupported


def _completions(response: Response, encoders: defaultdict[int, _TokensEncoder]) -> list[dict[str, Any]]:
    return [{"text": each.text, "tokens": encoders[index].tokens} for index, each in enumerate(response.completions)]


class LoadModel(StrictModel):
    """What to load; a model that the configuration names, a folder, or a model of the hub."""

    model_name: LoadableName
    device: DeviceName | None = None
    hf_token: HubToken | None = Field(None, description="For a gated model: used for this load and then forgotten.")


class ModelMessage(TypedDict):
    """What has been done, in the language of this system."""

    message: str


@router.post("/load_model", response_model=ModelMessage, responses=LOAD_ERRORS)
async def load_model(body: LoadModel, caller: LoadModelsDep, container: ContainerDep) -> ModelMessage:
    """Load a model, for callers who may, and return once it can serve requests."""
    name = body.model_name
    if (load := container.loader.loads.get(name)) is not None:
        # At the start, say: it is not loaded a second time, with the device that is asked for.
        await load.wait()
    if not _serves(name, body.device, container):
        spec = await _spec(body, container)
        name = spec.name
        await container.loader.load(spec).wait()
    return {"message": f"Modelo {name} carregado com sucesso."}


def _serves(name: str, device: str | None, container: Container) -> bool:
    """Return whether a model is loaded already, on the device that is asked for or on none of this machine."""
    if name not in container.host.loaded:
        return False  # to ask for it would load it, on the configured device
    try:
        info = container.host.find_generating(name).engine.info
    except AppError:
        return False
    return device in (None, "auto") or info.device is None or info.device.partition(":")[0] == device


@router.post("/unload_model", response_model=ModelMessage, responses=UNLOAD_ERRORS)
async def unload_model(caller: LoadModelsDep, container: ContainerDep) -> ModelMessage:
    """Unload the model that was loaded last, for callers who may, once its requests have ended."""
    host = container.host
    generating = [each.name for each in host.models if isinstance(each, ServedModel) and each.name in host.loaded]
    if not generating:
        raise ModelNotFound("No model is loaded.")
    await container.loader.unload(generating[-1])
    return {"message": f"Modelo {generating[-1]} descarregado com sucesso."}


async def _spec(body: LoadModel, container: Container) -> LoadSpec:
    """Raises: Forbidden: it may not be loaded; ModelLoadFailed: there is no such folder."""
    settings = container.settings
    defaults = settings.model
    own = {} if body.device is None else {"device": body.device}
    token = revealed(body.hf_token)
    known = container.loader.known.get(body.model_name)
    if known is None and body.model_name in (defaults.public_name, defaults.name):
        token = token or revealed(settings.hub_token)
        known = LoadSpec(name=defaults.public_name, config=defaults)
    if known is not None:
        return LoadSpec(name=known.name, config=known.config.model_copy(update=own), hub_token=token or known.hub_token)
    # A thread: the folder may be on a slow disk.
    return await asyncio.to_thread(_checked_spec, body.model_name, defaults, own, token)


def _checked_spec(name: str, defaults: ModelConfig, own: Mapping[str, Any], token: str | None) -> LoadSpec:
    source = "local" if _is_folder(name, defaults.roots) else "hub"
    config = check_source(beside(defaults, name=name, source=source, **own), defaults)
    task = task_of(Path(config.name)) if source == "local" else "generate"
    return LoadSpec(name=config.own_name, config=config, task=task, hub_token=token)


def _is_folder(name: str, roots: Sequence[Path]) -> bool:
    """Return whether a name is that of a folder; outside of the roots nothing is looked up."""
    if name.startswith(("/", ".")) or ".." in name:
        return True
    if any(Path(name).absolute().is_relative_to(root.absolute()) for root in roots):
        return True
    try:
        return any((root / name).is_dir() for root in roots)
    except OSError:  # the name is longer than that of any folder
        return False


class GenerateApiKey(StrictModel):
    """The owner of the new key."""

    username: OwnerName


class GeneratedApiKey(BaseModel):
    """The secret of the new key."""

    api_key: str


@router.post(
    "/generate_apikey",
    response_model=GeneratedApiKey,
    responses=error_responses(
        InvalidRequest, Unauthorized, Forbidden, RoleNotFound, RateLimited, InternalError, StoreUnavailable
    ),
)
async def generate_apikey(body: GenerateApiKey, caller: AdminDep, access: AccessDep) -> GeneratedApiKey:
    """Create a key of the role standard, for callers who may manage keys."""
    _, key = await access.keys.create(role="standard", owner=body.username)
    return GeneratedApiKey(api_key=key)
