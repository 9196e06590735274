"""POST /v1/generate: go on with a plain text.  Translation only."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, StringConstraints

from app.generation.requests import CompletionAsk, Reply, Sampling
from app.types import FinishReason
from app.web.http.dependencies import Call, CallDep, ServiceDep
from app.web.http.errors import document
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import SamplingFields, check_length
from app.web.http.sse import EventStream, begin, whole
from app.web.native.schemas import GENERATION_ERRORS, CompletionReply, NativeStream, UsageReply, completion_replies

router = APIRouter(prefix="/v1", tags=["generate"], route_class=LimitedRoute)


class GenerateRequest(SamplingFields):
    """A prompt, and how to go on with it."""

    prompt: Annotated[str, StringConstraints(min_length=1)]

    def to_ask(self, call: Call) -> CompletionAsk:
        """Raises: InvalidRequest: the prompt is too long, or two names of one field differ."""
        check_length("prompt", len(self.prompt), call.max_prompt_chars)
        return CompletionAsk(
            id=call.ask_id,
            caller=call.caller,
            prompt=self.prompt,
            sampling=self.sampling(),
            model=self.model,
            cache=self.cache and call.may_cache,
            origin=call.origin,
        )


class GenerateReply(BaseModel):
    """A whole answer, or several."""

    generated_text: str
    """The first of `completions`."""
    prompt: str
    model: str
    tokens_generated: int
    cached: bool
    finish_reason: FinishReason
    completions: list[CompletionReply]
    usage: UsageReply
    request_id: str

    @classmethod
    def of(cls, reply: Reply, sampling: Sampling, request_id: str) -> "GenerateReply":
        finished = reply.finished
        return cls(
            generated_text=reply.text,
            prompt=reply.prompt or "",
            model=finished.model,
            tokens_generated=finished.usage.completion_tokens,
            cached=finished.cached,
            finish_reason=finished.finish_reason,
            completions=completion_replies(reply, sampling),
            usage=UsageReply.of(finished.usage),
            request_id=request_id,
        )


# What was not set is what was not asked for.
@router.post(
    "/generate", response_model=GenerateReply, response_model_exclude_unset=True, responses=document(*GENERATION_ERRORS)
)
async def generate(
    body: GenerateRequest, request: Request, call: CallDep, service: ServiceDep
) -> GenerateReply | EventStream:
    """Go on with a text, whole or, with `stream`, as server-sent events `delta`... and `done` or `error`."""
    ask = body.to_ask(call)
    events = service.complete(ask)
    if body.stream:
        return EventStream(await begin(request, events), events, NativeStream(ask.sampling, call.request_id))
    return GenerateReply.of(await whole(request, events), ask.sampling, call.request_id)
