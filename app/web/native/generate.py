"""POST /v1/generate: completes a plain text."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, StringConstraints

from app.generation.requests import CompletionAsk, Reply, Sampling
from app.types import FinishReason
from app.web.http.dependencies import RequestContext, RequestContextDep, ServiceDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import check_length
from app.web.http.sse import EventStream, collect_response, wait_for_start
from app.web.native.request_model import SamplingFields
from app.web.native.schemas import CompletionChoice, NativeStreamEncoder, TokenUsage, completion_choices

router = APIRouter(prefix="/v1", tags=["generate"], route_class=LimitedRoute)


class GenerateRequest(SamplingFields):
    """A prompt and its sampling parameters."""

    prompt: Annotated[str, StringConstraints(min_length=1)]

    def to_generation_request(self, context: RequestContext) -> CompletionAsk:
        """Raises: InvalidRequest: the prompt is too long, or two synonyms have different values."""
        check_length("prompt", len(self.prompt), context.max_prompt_chars)
        return CompletionAsk(
            id=context.generation_id,
            caller=context.caller,
            prompt=self.prompt,
            sampling=self.sampling(),
            model=self.model,
            cache=self.cache and context.may_cache,
            origin=context.origin,
        )


class GenerateResponse(BaseModel):
    """The completions of one prompt."""

    generated_text: str
    """The first of `completions`."""
    prompt: str
    model: str
    tokens_generated: int
    cached: bool
    finish_reason: FinishReason
    completions: list[CompletionChoice]
    usage: TokenUsage
    request_id: str

    @classmethod
    def of(cls, reply: Reply, sampling: Sampling, request_id: str) -> "GenerateResponse":
        finished = reply.finished
        return cls(
            generated_text=reply.text,
            prompt=reply.prompt or "",
            model=finished.model,
            tokens_generated=finished.usage.completion_tokens,
            cached=finished.cached,
            finish_reason=finished.finish_reason,
            completions=completion_choices(reply, sampling),
            usage=TokenUsage.of(finished.usage),
            request_id=request_id,
        )


# Fields that the request did not ask for are unset, and left out.
@router.post(
    "/generate",
    response_model=GenerateResponse,
    response_model_exclude_unset=True,
    responses=error_responses(*GENERATION_ERRORS),
)
async def generate(
    body: GenerateRequest, request: Request, context: RequestContextDep, service: ServiceDep
) -> GenerateResponse | EventStream:
    """Complete a text: as one response, or with `stream` as events `delta`... and `done` or `error`."""
    generation_request = body.to_generation_request(context)
    events = service.complete(generation_request)
    if body.stream:
        return EventStream(
            await wait_for_start(request, events),
            events,
            NativeStreamEncoder(generation_request.sampling, context.request_id),
        )
    return GenerateResponse.of(await collect_response(request, events), generation_request.sampling, context.request_id)
