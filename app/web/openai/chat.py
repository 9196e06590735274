"""POST /v1/chat/completions.  Translation only."""

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Header, Request
from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError, model_validator
from starlette.responses import Response

from app.errors import InvalidRequest
from app.generation.requests import ChatAsk, Completion, Reply
from app.types import Message, Role
from app.web.http.dependencies import Call, CallDep, PartsDep, note_end_user
from app.web.http.errors import document
from app.web.http.json_body import LimitedRoute, StrictModel
from app.web.http.sampling_params import SessionId, TokenCount, check_length
from app.web.native.chat import MAX_MESSAGES
from app.web.native.schemas import GENERATION_ERRORS
from app.web.openai.request_model import OpenAIFields, Served, is_deterministic
from app.web.openai.respond import head, respond
from app.web.openai.response_objects import Head, chat_logprobs, ending_fields, usage_object
from app.web.openai.stream_encoder import ChatChoices, ChunkStream
from app.web.openai.validators import Metadata, Only

router = APIRouter(prefix="/v1", tags=["openai"], route_class=LimitedRoute)

_ROLES = {"developer": Role.SYSTEM}
"""Roles that have another name here."""


class TextPart(StrictModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[Any, Only()] = None


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(StrictModel):
    """One message; what the assistant said may come back as this service sent it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart], Field(min_length=1), BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])
    ]
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    name: Annotated[Any, Only()] = None
    refusal: Annotated[Any, Only()] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _names_the_call(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to a message of the role tool, and to no other")
        return self

    def translated(self) -> Message:
        """Join the parts, each on a line of its own."""
        return Message(_ROLES.get(self.role) or Role(self.role), "\n".join(part.text for part in self.content))


class ChatCompletionRequest(OpenAIFields):
    """OpenAI's fields, vLLM's extras, and a session of ours."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Metadata = Field(None, description="Stands in the answer again, unless that is a stream.")
    safety_identifier: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        None, description="The newer name of user, and preferred to it."
    )
    service_tier: Annotated[str | None, Only("auto", "default")] = None
    session_id: SessionId | None = Field(None, description="Continues the caller's own session of this name.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message, the assistant's.")
    add_generation_prompt: bool | None = Field(None, description="The opposite of continue_final_message.")

    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    modalities: Annotated[Any, Only(["text"])] = None
    moderation: Annotated[Any, Only()] = None
    parallel_tool_calls: Annotated[Any, Only(True)] = None
    prediction: Annotated[Any, Only()] = None
    prompt_cache_key: Annotated[Any, Only()] = None
    prompt_cache_options: Annotated[Any, Only()] = None
    prompt_cache_retention: Annotated[Any, Only("in_memory")] = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    store: Annotated[Any, Only(False)] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    tools: Annotated[Any, Only([])] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None

    def to_ask(self, call: Call, served: Served, session_header: str | None) -> ChatAsk:
        """Raises: InvalidRequest: the messages are too long together, or fields contradict each other."""
        self.check_stream_options()
        self._check_going_on()
        messages = tuple(message.translated() for message in self.messages)
        check_length("messages", sum(len(message.content) for message in messages), call.max_prompt_chars)
        sampling = self.sampling(served, max_tokens=self._max_tokens(), logprobs=self._logprobs())
        return ChatAsk(
            id=call.ask_id,
            caller=call.caller,
            origin=call.origin,
            messages=messages,
            session_id=self._session(session_header),
            sampling=sampling,
            model=self.model,
            cache=call.may_cache and served.caches and is_deterministic(sampling),
            go_on=bool(self.continue_final_message),
        )

    def _max_tokens(self) -> int | None:
        given = {value for value in (self.max_completion_tokens, self.max_tokens) if value is not None}
        if len(given) > 1:
            raise InvalidRequest.of_field(
                "max_tokens", "and max_completion_tokens are two names of one field and have different values"
            )
        return next(iter(given), None)

    def _logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest.of_field("top_logprobs", "is only possible where logprobs is true")
        return None

    def _check_going_on(self) -> None:
        going_on = bool(self.continue_final_message)
        if self.add_generation_prompt is going_on:
            raise InvalidRequest.of_field("add_generation_prompt", "must be the opposite of continue_final_message")
        if going_on and self.messages[-1].role != "assistant":
            raise InvalidRequest.of_field("continue_final_message", "needs a last message of the assistant")

    def _session(self, header: str | None) -> str | None:
        if header is None:
            return self.session_id
        try:
            named: str = _SESSION_ID.validate_python(header)
        except ValidationError:
            raise InvalidRequest.of_field("X-Session-ID", "must be 1 to 128 letters, digits, dots, - or _") from None
        if self.session_id not in (None, named):
            raise InvalidRequest.of_field("session_id", "and the header X-Session-ID name two sessions")
        return named


_SESSION_ID: TypeAdapter[str] = TypeAdapter(SessionId)


def _whole(reply: Reply, head: Head, body: ChatCompletionRequest) -> dict[str, Any]:
    choices = [_choice(index, each, bool(body.logprobs)) for index, each in enumerate(reply.completions)]
    made = head.object("chat.completion", choices, usage_object(reply.finished.usage))
    return made if body.metadata is None else {**made, "metadata": body.metadata}


def _choice(index: int, completion: Completion, scored: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": chat_logprobs(completion.tokens) if scored else None,
        **ending_fields(completion.ending),
    }


@router.post("/chat/completions", responses=document(*GENERATION_ERRORS, speaks_openai=True))
async def chat_completions(
    body: ChatCompletionRequest,
    request: Request,
    call: CallDep,
    parts: PartsDep,
    x_session_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Answer a conversation as OpenAI does, whole or, with `stream`, as chunks."""
    note_end_user(request, body.safety_identifier or body.user)
    served = Served.of(parts, body.model)
    ask = body.to_ask(call, served, x_session_id)
    about = head("chatcmpl", served, service_tier=body.service_tier and "default")
    choices = ChatChoices(ask.sampling)
    chunks = ChunkStream(about, choices, answers=ask.sampling.n, usage_told=body.usage_told)
    return await respond(
        request,
        parts.service.chat(ask),
        stream=chunks if body.stream else None,
        make=lambda reply: _whole(reply, about, body),
        may_be_stored=ask.cache,
    )
