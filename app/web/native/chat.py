"""POST /v1/chat: replies to the last message of a conversation, with or without a session."""

from typing import Annotated, Literal, NotRequired, Self

from fastapi import APIRouter
from pydantic import AfterValidator, Field, StringConstraints, model_validator
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.events import Response
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role
from app.web.http.dependencies import RequestContext, RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.sampling_params import MAX_MESSAGES, SessionId, check_length
from app.web.http.sse import streamed
from app.web.http.template_kwargs import ReasoningEffort, TemplateKwargs, template_variables
from app.web.http.tool_calls import AnsweredId, Calls, ReasonedFields, ToolCallObject, reasoned_fields, to_calls
from app.web.http.tool_definitions import ToolChoiceField, Tools, tool_fields
from app.web.native.request_model import SamplingFields
from app.web.native.schemas import (
    EVENTS,
    CompletionChoice,
    ContextFields,
    Logprobs,
    TokenUsage,
    completion_choices,
    context_fields,
    finished_usage,
    respond,
)

router = APIRouter(prefix="/v1", tags=["chat"], route_class=GeneratingRoute)


class MessageFields(StrictModel):
    """One message; an assistant's may have the fields of this service's own responses."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = Field(
        None, description="Empty or null only where an assistant calls, or a tool says nothing."
    )
    tool_calls: Calls | None = Field(None, description="What the assistant called; of no other role.")
    tool_call_id: AnsweredId | None = Field(None, description="Required of the role tool, and of no other.")
    name: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    reasoning_content: str | None = Field(None, description="What the assistant thought before.")

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to a message of the role tool, and to no other")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the role assistant")
        if not (self.content or self.tool_calls or self.reasoning_content or self.role == "tool"):
            raise ValueError("content must not be empty")
        return self

    def to_message(self) -> Message:
        """Return the message as the service takes it."""
        return Message(
            Role(self.role),
            self.content or "",
            tool_calls=to_calls(self.tool_calls or ()),
            tool_call_id=self.tool_call_id,
            reasoning=(self.reasoning_content or None) if self.role == "assistant" else None,
            name=self.name,
        )


def _ends_with_question(messages: list[MessageFields]) -> list[MessageFields]:
    if messages[-1].role not in ("user", "tool"):
        raise ValueError("the last message must be the user's or a tool's")
    return messages


class ChatRequest(SamplingFields):
    """A conversation; with a session id, its newest messages only."""

    messages: Annotated[
        list[MessageFields], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_ends_with_question)
    ]
    session_id: SessionId | None = Field(None, description="Continues the caller's own session of this name.")
    tools: Tools | None = Field(None, description="Functions that the model may ask for, as in OpenAI's API.")
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = Field(None, description="False: one completion calls one function at most.")
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: TemplateKwargs = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )

    def to_generation(self, context: RequestContext) -> GenerationRequest:
        """Raises: InvalidRequest: the messages exceed the limit in total, or the tools are wrong."""
        messages = tuple(message.to_message() for message in self.messages)
        check_length("messages", sum(len(message.all_text) for message in messages), context.max_prompt_chars)
        definitions = [tool.function for tool in self.tools or ()]
        return self.to_request(
            context,
            messages=messages,
            session_id=self.session_id,
            reasoning_effort=self.reasoning_effort,
            template_kwargs=template_variables(self.chat_template_kwargs),
            **tool_fields(definitions, self.tool_choice, parallel=self.parallel_tool_calls is not False),
        )


class AssistantMessage(ReasonedFields):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str


class ChatChoice(CompletionChoice):
    """One of several completions of a conversation."""

    tool_calls: NotRequired[list[ToolCallObject]]
    reasoning_content: NotRequired[str]


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
    completions: NotRequired[list[ChatChoice]]
    """All completions; left out unless the request asked for several or for log-probabilities."""


def _response(response: Response, request: GenerationRequest, request_id: str, logprobs: Logprobs) -> ChatResponse:
    finished = response.finished
    fields: ChatResponse = {
        "message": {"role": "assistant", "content": response.text, **reasoned_fields(response.completions[0])},
        "model": finished.model,
        "tokens_generated": finished.usage.completion_tokens,
        "cached": finished.cached,
        "session_id": finished.session_id,
        "finish_reason": finished.finish_reason,
        "usage": finished_usage(finished),
        "context": context_fields(finished.context) if finished.context else None,
        "request_id": request_id,
    }
    if request.n > 1 or logprobs is not None:
        choices = completion_choices(response, logprobs)
        fields["completions"] = [
            {**choice, **reasoned_fields(each)} for choice, each in zip(choices, response.completions, strict=True)
        ]
    return fields


@router.post("/chat", response_model=ChatResponse, responses=error_responses(*GENERATION_ERRORS) | streamed(*EVENTS))
async def chat(body: ChatRequest, context: RequestContextDep) -> HttpResponse:
    """Reply to the last message: as one response, or with `stream` as events `delta`... and `done` or `error`."""
    return await respond(context, body.to_generation(context), _response)
