"""LLM Inference API: `parameters` on POST /generate, with log-probabilities of every token, and POST /generate_apikey.

Its POST /generate shares the path with another system's; `generate.py` tells the two apart.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    RateLimited,
    RoleNotFound,
    StoreUnavailable,
    Unauthorized,
)
from app.events import DetokenizedLogprob, Response
from app.web.compat.completion_fields import Temperature, completion_request
from app.web.http.dependencies import AccessDep, AdminDep, RequestContext
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.json_encoding import (
    JsonArray,
    LogprobsEncoder,
    SegmentedJsonResponse,
    encode_logprobs,
    exact_float,
)
from app.web.http.owner_name import OwnerName
from app.web.http.sampling_params import SampleCount, StopTexts, TokenCount, TopP
from app.web.http.sse import collect_response

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
    context: RequestContext, prompt: str, model: str | None, parameters: GenerationParameters
) -> HttpResponse:
    """Complete a prompt; the response has the log-probability of every token, as far as there is one."""
    began = time.perf_counter()
    scored = context.caller.rights.raw_logprobs and _has_logprobs(context, model)
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
        n=parameters.num_return_sequences or 1,
        stream=False,
    )
    encoders = defaultdict[int, _TokensEncoder](_TokensEncoder)
    response = await collect_response(context.request, encode_logprobs(context.events(request), encoders))
    seconds = time.perf_counter() - began
    return SegmentedJsonResponse(
        {"success": True, "request_time": round(seconds, 6), "completions": _completions(response, encoders)}
    )


def _has_logprobs(context: RequestContext, model: str | None) -> bool:
    """Raises: as `RequestContext.model_info`."""
    return "logprobs" not in context.model_info(model).capabilities.unsupported


def _completions(response: Response, encoders: defaultdict[int, _TokensEncoder]) -> list[dict[str, Any]]:
    return [{"text": each.text, "tokens": encoders[index].tokens} for index, each in enumerate(response.completions)]


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
