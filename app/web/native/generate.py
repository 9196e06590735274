"""POST /v1/generate: completes a plain text."""

from typing import Annotated, NotRequired

from fastapi import APIRouter
from pydantic import StringConstraints
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.events import Response
from app.requests import GenerationRequest
from app.types import FinishReason
from app.web.http.dependencies import RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute
from app.web.http.sampling_params import check_length
from app.web.http.sse import streamed
from app.web.native.request_model import SamplingFields
from app.web.native.schemas import (
    EVENTS,
    CompletionChoice,
    Logprobs,
    TokenUsage,
    completion_choices,
    respond,
    token_usage,
)

router = APIRouter(prefix="/v1", tags=["generate"], route_class=GeneratingRoute)


class GenerateRequest(SamplingFields):
    """A prompt and its sampling parameters."""

    prompt: Annotated[str, StringConstraints(min_length=1)]


class GenerateResponse(TypedDict):
    """The completions of one prompt."""

    generated_text: str
    """The first of `completions`."""
    prompt: str
    output: NotRequired[str]
    """Another name of `generated_text`; left out in a batch."""
    model: str
    tokens_generated: int
    cached: bool
    finish_reason: FinishReason
    completions: list[CompletionChoice]
    usage: TokenUsage
    request_id: str


def generate_response(
    response: Response, request: GenerationRequest, request_id: str, logprobs: Logprobs
) -> GenerateResponse:
    finished = response.finished
    return {
        "generated_text": response.text,
        "prompt": response.prompt or "",
        "model": finished.model,
        "tokens_generated": finished.usage.completion_tokens,
        "cached": finished.cached,
        "finish_reason": finished.finish_reason,
        "completions": completion_choices(response, logprobs),
        "usage": token_usage(finished.usage),
        "request_id": request_id,
    }


@router.post(
    "/generate", response_model=GenerateResponse, responses=error_responses(*GENERATION_ERRORS) | streamed(*EVENTS)
)
async def generate(body: GenerateRequest, context: RequestContextDep) -> HttpResponse:
    """Complete a text: as one response, or with `stream` as events `delta`... and `done` or `error`."""
    check_length("prompt", len(body.prompt), context.max_prompt_chars)
    return await respond(context, body.to_request(context, text=body.prompt), _with_output)


def _with_output(
    response: Response, request: GenerationRequest, request_id: str, logprobs: Logprobs
) -> GenerateResponse:
    return {**generate_response(response, request, request_id, logprobs), "output": response.text}
