"""POST /v1/chat: answer the last message of a conversation, with or without a session.  Translation only."""

from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.generation.requests import ChatAsk, Context, Reply, Sampling
from app.types import FinishReason, Message, Role
from app.web.http.dependencies import Call, CallDep, ServiceDep
from app.web.http.errors import document
from app.web.http.json_body import LimitedRoute, StrictModel
from app.web.http.sampling_params import SamplingFields, SessionId, check_length
from app.web.http.sse import EventStream, begin, whole
from app.web.native.schemas import GENERATION_ERRORS, CompletionReply, NativeStream, UsageReply, completion_replies

MAX_MESSAGES = 256

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

    def to_ask(self, call: Call) -> ChatAsk:
        """Raises: InvalidRequest: the messages are too long together, or two names of one field differ."""
        check_length("messages", sum(len(message.content) for message in self.messages), call.max_prompt_chars)
        return ChatAsk(
            id=call.ask_id,
            caller=call.caller,
            messages=tuple(Message(Role(message.role), message.content) for message in self.messages),
            session_id=self.session_id,
            sampling=self.sampling(),
            model=self.model,
            cache=self.cache and call.may_cache,
            origin=call.origin,
        )


class MessageReply(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str


class ContextReply(BaseModel):
    """How the conversation was fitted into the context window."""

    limit: int
    prompt_tokens: int
    turns_kept: int
    turns_dropped: int

    @classmethod
    def of(cls, context: Context) -> "ContextReply":
        return cls(
            limit=context.limit,
            prompt_tokens=context.prompt_tokens,
            turns_kept=context.turns_kept,
            turns_dropped=context.turns_dropped,
        )


class ChatReply(BaseModel):
    """A whole answer, or several."""

    message: MessageReply
    """The first answer."""
    model: str
    tokens_generated: int
    cached: bool
    session_id: str | None
    finish_reason: FinishReason
    usage: UsageReply
    context: ContextReply | None
    request_id: str
    completions: list[CompletionReply] = []
    """All answers; left out unless several or log-probabilities were asked for."""

    @classmethod
    def of(cls, reply: Reply, sampling: Sampling, request_id: str) -> "ChatReply":
        finished = reply.finished
        several = sampling.n > 1 or sampling.logprobs is not None
        return cls(
            message=MessageReply(role="assistant", content=reply.text),
            model=finished.model,
            tokens_generated=finished.usage.completion_tokens,
            cached=finished.cached,
            session_id=finished.session_id,
            finish_reason=finished.finish_reason,
            usage=UsageReply.of(finished.usage),
            context=ContextReply.of(finished.context) if finished.context else None,
            request_id=request_id,
            **({"completions": completion_replies(reply, sampling)} if several else {}),
        )


# What was not set is what was not asked for.
@router.post(
    "/chat", response_model=ChatReply, response_model_exclude_unset=True, responses=document(*GENERATION_ERRORS)
)
async def chat(body: ChatRequest, request: Request, call: CallDep, service: ServiceDep) -> ChatReply | EventStream:
    """Answer the last message, whole or, with `stream`, as server-sent events `delta`... and `done` or `error`."""
    ask = body.to_ask(call)
    events = service.chat(ask)
    if body.stream:
        return EventStream(await begin(request, events), events, NativeStream(ask.sampling, call.request_id))
    return ChatReply.of(await whole(request, events), ask.sampling, call.request_id)
