"""POST /v1/chat: replies to the last message of a conversation, with or without a session."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.generation.requests import ChatAsk, Context, Reply, Sampling
from app.types import FinishReason, Message, Role
from app.web.http.dependencies import RequestContext, RequestContextDep, ServiceDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import LimitedRoute, StrictModel
from app.web.http.sampling_params import MAX_MESSAGES, SessionId, check_length
from app.web.http.sse import EventStream, collect_response, wait_for_start
from app.web.native.request_model import SamplingFields
from app.web.native.schemas import CompletionChoice, NativeStreamEncoder, TokenUsage, completion_choices

router = APIRouter(prefix="/v1", tags=["chat"], route_class=LimitedRoute)


class MessageFields(StrictModel):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, StringConstraints(min_length=1)]


def _ends_with_user(messages: list[MessageFields]) -> list[MessageFields]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be the user's")
    return messages


class ChatRequest(SamplingFields):
    """A conversation; with a session id, its newest messages only."""

    messages: Annotated[
        list[MessageFields], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_ends_with_user)
    ]
    session_id: SessionId | None = Field(None, description="Continues the caller's own session of this name.")

    def to_generation_request(self, context: RequestContext) -> ChatAsk:
        """Raises: InvalidRequest: the messages exceed the limit in total, or two synonyms have different values."""
        check_length("messages", sum(len(message.content) for message in self.messages), context.max_prompt_chars)
        return ChatAsk(
            id=context.generation_id,
            caller=context.caller,
            messages=tuple(Message(Role(message.role), message.content) for message in self.messages),
            session_id=self.session_id,
            sampling=self.sampling(),
            model=self.model,
            cache=self.cache and context.may_cache,
            origin=context.origin,
        )


class AssistantMessage(BaseModel):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str


class ContextUsage(BaseModel):
    """How the conversation was fitted into the context window."""

    limit: int
    prompt_tokens: int
    turns_kept: int
    turns_dropped: int

    @classmethod
    def of(cls, context: Context) -> "ContextUsage":
        return cls(
            limit=context.limit,
            prompt_tokens=context.prompt_tokens,
            turns_kept=context.turns_kept,
            turns_dropped=context.turns_dropped,
        )


class ChatResponse(BaseModel):
    """The completions of one conversation."""

    message: AssistantMessage
    """The first completion."""
    model: str
    tokens_generated: int
    cached: bool
    session_id: str | None
    finish_reason: FinishReason
    usage: TokenUsage
    context: ContextUsage | None
    request_id: str
    completions: list[CompletionChoice] = []
    """All completions; left out unless the request asked for several or for log-probabilities."""

    @classmethod
    def of(cls, reply: Reply, sampling: Sampling, request_id: str) -> "ChatResponse":
        finished = reply.finished
        several = sampling.n > 1 or sampling.logprobs is not None
        return cls(
            message=AssistantMessage(role="assistant", content=reply.text),
            model=finished.model,
            tokens_generated=finished.usage.completion_tokens,
            cached=finished.cached,
            session_id=finished.session_id,
            finish_reason=finished.finish_reason,
            usage=TokenUsage.of(finished.usage),
            context=ContextUsage.of(finished.context) if finished.context else None,
            request_id=request_id,
            **({"completions": completion_choices(reply, sampling)} if several else {}),
        )


# Fields that the request did not ask for are unset, and left out.
@router.post(
    "/chat",
    response_model=ChatResponse,
    response_model_exclude_unset=True,
    responses=error_responses(*GENERATION_ERRORS),
)
async def chat(
    body: ChatRequest, request: Request, context: RequestContextDep, service: ServiceDep
) -> ChatResponse | EventStream:
    """Reply to the last message: as one response, or with `stream` as events `delta`... and `done` or `error`."""
    generation_request = body.to_generation_request(context)
    events = service.chat(generation_request)
    if body.stream:
        return EventStream(
            await wait_for_start(request, events),
            events,
            NativeStreamEncoder(generation_request.sampling, context.request_id),
        )
    return ChatResponse.of(await collect_response(request, events), generation_request.sampling, context.request_id)
