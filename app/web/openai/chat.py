"""POST /v1/chat/completions: replies to a conversation."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, TypeAdapter, ValidationError
from starlette.responses import Response as HttpResponse

from app.errors import InvalidRequest
from app.events import Completion, Response
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext, RequestContextDep, bind_end_user
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute
from app.web.http.sampling_params import MAX_MESSAGES, MAX_TOKENS, SessionId, check_length
from app.web.http.sse import streamed
from app.web.http.template_kwargs import ReasoningEffort, TemplateKwargs, template_variables
from app.web.http.tool_definitions import FunctionChoiceField, Functions, ToolChoiceField, Tools, tool_fields
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.messages import ChatMessage
from app.web.openai.prompt_logprobs import ChatSampleLogprobs
from app.web.openai.request_model import OpenAIFields
from app.web.openai.respond import new_metadata, respond
from app.web.openai.response_objects import (
    ChatCompletion,
    ObjectMetadata,
    chat_finish_fields,
    chat_message,
    usage_object,
)
from app.web.openai.stream_encoder import ChatChoiceEncoder, ChunkStreamEncoder
from app.web.openai.validators import NeutralOnly

router = APIRouter(prefix="/v1", tags=["openai"], route_class=GeneratingRoute)


class ChatCompletionRequest(OpenAIFields):
    """OpenAI's fields, vLLM's extensions, and the native `session_id`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    session_id: SessionId | None = Field(None, description="Continues the caller's own session of this name.")
    continue_final_message: bool | None = Field(None, description="Continue the last message, the assistant's.")
    add_generation_prompt: bool | None = Field(None, description="The opposite of continue_final_message.")
    prediction: dict[str, Any] | None = Field(None, description="A hint: the completion is not generated faster.")
    tools: Tools | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = Field(None, description="False: one completion calls one function at most.")
    functions: Functions | None = Field(None, description="The older form of tools.")
    function_call: FunctionChoiceField = Field(None, description="The older form of tool_choice.")
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: TemplateKwargs = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )
    enable_thinking: bool | None = Field(None, description="The same as in chat_template_kwargs.")

    add_special_tokens: Annotated[Any, NeutralOnly(False)] = None
    audio: Annotated[Any, NeutralOnly()] = None
    modalities: Annotated[Any, NeutralOnly(["text"])] = None
    moderation: Annotated[Any, NeutralOnly()] = None
    web_search_options: Annotated[Any, NeutralOnly()] = None

    def to_generation(self, context: RequestContext) -> GenerationRequest:
        """Raises: InvalidRequest: the messages exceed the limit in total, or fields contradict each other."""
        self.check_stream_options()
        self._check_continuation()
        messages = tuple(message.to_message() for message in self.messages)
        check_length("messages", sum(len(message.all_text) for message in messages), context.max_prompt_chars)
        max_tokens = self._max_tokens()
        self.check_prompt_options(max_tokens=max_tokens)
        return self.to_request(
            context,
            max_tokens=max_tokens,
            logprobs=self._logprobs(),
            prompt_logprobs=self.prompt_logprobs,
            messages=messages,
            session_id=self._session(context.request.headers.get("x-session-id")),
            continue_final_message=bool(self.continue_final_message),
            reasoning_effort=self.reasoning_effort,
            template_kwargs=template_variables(self.chat_template_kwargs, enable_thinking=self.enable_thinking),
            **self._tools(),
        )

    @property
    def uses_functions(self) -> bool:
        """Whether calls are in the older form."""
        return bool(self.functions)

    def _tools(self) -> dict[str, Any]:
        """Raises: InvalidRequest: the tools or the choice among them are wrong."""
        if self.functions is None and self.function_call is None:
            definitions = [tool.function for tool in self.tools or ()]
            return tool_fields(definitions, self.tool_choice, parallel=self.parallel_tool_calls is not False)
        if self.tools:
            raise InvalidRequest.of_field("functions", "and tools are two forms of one field; send one of them")
        names = ("functions", "function_call")
        return tool_fields(self.functions or (), self.function_call, parallel=False, names=names, name_path="name")

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

    def _check_continuation(self) -> None:
        continues = bool(self.continue_final_message)
        if self.add_generation_prompt is continues:
            raise InvalidRequest.of_field("add_generation_prompt", "must be the opposite of continue_final_message")
        last = self.messages[-1]
        if continues and (last.role != "assistant" or last.tool_calls or last.function_call):
            raise InvalidRequest.of_field(
                "continue_final_message", "needs a last message of the assistant, with no call"
            )

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


_SESSION_HEADER = {
    "name": "x-session-id",
    "in": "header",
    "required": False,
    "schema": _SESSION_ID.json_schema(),
}
"""For the OpenAPI document: another place of `session_id`."""


def _response(
    response: Response,
    metadata: ObjectMetadata,
    body: ChatCompletionRequest,
    logprobs: Mapping[int, ChatSampleLogprobs] | None,
) -> dict[str, Any]:
    own = logprobs if body.logprobs else None
    choices = [
        _choice(index, each, own, as_functions=body.uses_functions) for index, each in enumerate(response.completions)
    ]
    fields = metadata.object("chat.completion", choices, usage_object(response.finished))
    if logprobs is not None and (prompt := logprobs[0].prompt) is not None:
        fields = {**fields, "prompt_logprobs": prompt.positions}
    return fields if body.metadata is None else {**fields, "metadata": body.metadata}


def _choice(
    index: int, completion: Completion, logprobs: Mapping[int, ChatSampleLogprobs] | None, *, as_functions: bool
) -> dict[str, Any]:
    return {
        "index": index,
        "message": chat_message(completion, as_functions=as_functions),
        "logprobs": None if logprobs is None else logprobs[index].completion.object(),
        **chat_finish_fields(completion.end, as_functions=as_functions),
    }


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=error_responses(*GENERATION_ERRORS, error_format=ERROR_FORMAT) | streamed(),
    openapi_extra={"parameters": [_SESSION_HEADER]},
)
async def chat_completions(body: ChatCompletionRequest, context: RequestContextDep) -> HttpResponse:
    """Reply to a conversation as OpenAI does: as one response, or with `stream` as chunks."""
    bind_end_user(context.request, body.safety_identifier or body.user)
    metadata = new_metadata("chatcmpl", context, body.model, body.adapter, service_tier=body.service_tier and "default")
    request = body.to_generation(context)
    choices = ChatChoiceEncoder(with_logprobs=bool(body.logprobs), as_functions=body.uses_functions)
    chunks = ChunkStreamEncoder(metadata, choices, n=request.n, stream_usage=body.stream_usage)
    scored = body.logprobs or body.prompt_logprobs is not None
    encoder = partial(ChatSampleLogprobs, body.prompt_logprobs)
    logprobs = defaultdict[int, ChatSampleLogprobs](encoder) if scored else None
    return await respond(
        context,
        context.events(request),
        stream=chunks if body.stream else None,
        logprobs=logprobs,
        build=lambda response: _response(response, metadata, body, logprobs),
    )
