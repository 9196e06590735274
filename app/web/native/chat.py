"""POST /v1/chat: replies to the last message of a conversation, with or without a session."""

from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter
from pydantic import AfterValidator, Field, StringConstraints
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.events import ContextUsage, Response
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role
from app.web.http.dependencies import RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.sampling_params import MAX_MESSAGES, SessionId, check_length
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

router = APIRouter(prefix="/v1", tags=["chat"], route_class=GeneratingRoute)


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


class AssistantMessage(TypedDict):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str


class ContextFields(TypedDict):
    """How the conversation was fitted into the context window."""

    limit: int
    prompt_tokens: int
    turns_kept: int
    turns_dropped: int


class ChatResponse(TypedDict):
    """The completions of one conversation."""

    message: AssistantMessage
    """The first completion."""
    model: str
    tokens_generated: int
    cached: bool
    session_id: str | None
    finish_reason: FinishReason
    usage: TokenUsage
    context: ContextFields | None
    request_id: str
    completions: NotRequired[list[CompletionChoice]]
    """All completions; left out unless the request asked for several or for log-probabilities."""


def _response(response: Response, request: GenerationRequest, request_id: str, logprobs: Logprobs) -> ChatResponse:
    finished = response.finished
    fields: ChatResponse = {
        "message": {"role": "assistant", "content": response.text},
        "model": finished.model,
        "tokens_generated": finished.usage.completion_tokens,
        "cached": finished.cached,
        "session_id": finished.session_id,
        "finish_reason": finished.finish_reason,
        "usage": token_usage(finished.usage),
        "context": _context(finished.context) if finished.context else None,
        "request_id": request_id,
    }
    if request.n > 1 or logprobs is not None:
        fields["completions"] = completion_choices(response, logprobs)
    return fields


def _context(context: ContextUsage) -> ContextFields:
    return {
        "limit": context.limit,
        "prompt_tokens": context.prompt_tokens,
        "turns_kept": context.turns_kept,
        "turns_dropped": context.turns_dropped,
    }


@router.post("/chat", response_model=ChatResponse, responses=error_responses(*GENERATION_ERRORS) | streamed(*EVENTS))
async def chat(body: ChatRequest, context: RequestContextDep) -> HttpResponse:
    """Reply to the last message: as one response, or with `stream` as events `delta`... and `done` or `error`."""
    check_length("messages", sum(len(message.content) for message in body.messages), context.max_prompt_chars)
    messages = tuple(Message(Role(message.role), message.content) for message in body.messages)
    return await respond(context, body.to_request(context, messages=messages, session_id=body.session_id), _response)
