"""POST /tokenize and /detokenize in vLLM's shapes: a model's own tokenizer for those who count or evaluate.

What is encoded is what the client sends and what the chat template makes of it: the service's own system message and
the history of a session are no part of it.  Nothing is generated, and no request is counted.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Self

from fastapi import APIRouter
from msgspec import structs
from pydantic import Field, model_validator
from typing_extensions import TypedDict

from app.access.rights import check_rights
from app.engine.base import EngineInfo
from app.engine.served_model import ServedModel
from app.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineNotReady,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Unauthorized,
)
from app.generation.template_options import resolve_template_options
from app.requests import GenerationRequest, TemplateValue
from app.web.http.dependencies import RequestContext, RequestContextDep
from app.web.http.errors import error_responses
from app.web.http.json_body import StrictModel, StrictRoute
from app.web.http.json_encoding import EncodedJsonResponse
from app.web.http.sampling_params import MAX_MESSAGES, TokenId
from app.web.http.template_kwargs import TemplateKwargs, template_variables
from app.web.http.tool_definitions import Tools, tool_fields
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.messages import ChatMessage
from app.web.openai.request_model import Name

router = APIRouter(tags=["openai"], route_class=StrictRoute)

_ERRORS = error_responses(
    InvalidRequest,
    Unauthorized,
    Forbidden,
    ModelNotFound,
    InternalError,
    DeadlineExceeded,
    EngineNotReady,
    error_format=ERROR_FORMAT,
)


class TokenizeRequest(StrictModel):
    """A text, or the messages of a chat."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="Begin with the tokens that the tokenizer puts in front of every text; left out: true for a "
        "prompt, false for messages, whose template writes them.",
    )
    add_generation_prompt: bool | None = Field(None, description="End where the assistant begins; true if left out.")
    continue_final_message: bool | None = Field(None, description="End where the last message, the assistant's, does.")
    return_token_strs: bool | None = None
    tools: Tools | None = Field(None, description="Of the chat, whose template shows them to the model.")
    chat_template_kwargs: TemplateKwargs = Field(None, description="Variables of the chat's template.")

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        return self

    def to_generation(self, context: RequestContext) -> GenerationRequest:
        """Return a request with this prompt, to be encoded.

        Raises: InvalidRequest: fields contradict each other.
        """
        continues = bool(self.continue_final_message)
        if self.messages is None:
            for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise InvalidRequest.of_field("messages", f"is needed where {name} is given")
            return context.generation(model=self.model, text=self.prompt)
        if continues and self.add_generation_prompt:
            raise InvalidRequest.of_field("add_generation_prompt", "must be the opposite of continue_final_message")
        if continues and self.messages[-1].role != "assistant":
            raise InvalidRequest.of_field("continue_final_message", "needs a last message of the assistant")
        return context.generation(
            model=self.model,
            messages=tuple(message.to_message() for message in self.messages),
            continue_final_message=continues,
            template_kwargs=template_variables(self.chat_template_kwargs),
            **tool_fields([tool.function for tool in self.tools or ()], None, parallel=True),
        )

    def in_template(self, request: GenerationRequest, info: EngineInfo) -> GenerationRequest:
        """Return the request with the variables that the model's template reads.

        Raises: InvalidRequest: it sets another one.
        """
        request = resolve_template_options(request, info)
        if self.add_generation_prompt is not False or self.continue_final_message or self.messages is None:
            return request
        open_end: tuple[str, TemplateValue] = ("add_generation_prompt", False)
        return structs.replace(request, template_kwargs=(*request.template_kwargs, open_end))


class DetokenizeRequest(StrictModel):
    """Token ids."""

    model: Name | None = None
    tokens: list[TokenId]


class Tokens(TypedDict):
    """A text as tokens."""

    count: int
    max_model_len: int
    """Tokens that fit the model, of prompt and completion together."""
    tokens: list[int]
    token_strs: list[str] | None
    """Each token on its own, where that was asked for; a part of a character is U+FFFD."""


class DetokenizedPrompt(TypedDict):
    """Tokens as a text, with the names of control tokens."""

    prompt: str


# A long text has many tokens; FastAPI would validate each of them again.
@router.post("/tokenize", response_model=Tokens, responses=_ERRORS)
async def tokenize(body: TokenizeRequest, context: RequestContextDep) -> EncodedJsonResponse:
    """Encode a text or a chat as the model reads it."""
    request = body.to_generation(context)
    async with _leased(request, context) as model:
        request = body.in_template(request, model.engine.info)
        ids = await _encode(request, model, begins=body.add_special_tokens)
        texts = await model.engine.token_texts(ids) if body.return_token_strs else None
    limit = model.engine.info.context_length
    return EncodedJsonResponse({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})


@router.post("/detokenize", response_model=DetokenizedPrompt, responses=_ERRORS)
async def detokenize(body: DetokenizeRequest, context: RequestContextDep) -> EncodedJsonResponse:
    """Return the text of tokens."""
    async with _leased(context.generation(model=body.model), context) as model:
        model.engine.info.check_tokens("tokens", body.tokens)
        return EncodedJsonResponse({"prompt": await model.engine.detokenize(body.tokens, control_tokens=True)})


@asynccontextmanager
async def _leased(request: GenerationRequest, context: RequestContext) -> AsyncIterator[ServedModel]:
    """Hold the model that a request names, once it is loaded where that may be waited for.

    Raises: Forbidden: the caller's role does not allow this model; others as `ModelLoader.ensure` and
        `ModelHost.lease`.
    """
    await context.ensure_model(request.model)
    host, rights = context.container.host, context.caller.rights
    with host.lease(request, allowed=rights.models) as model:
        name = host.adapters.named_by(request.model, None) or model.name
        check_rights(context.caller, model=name, logprobs=False, system_text=None, control_tokens=False)
        yield model


async def _encode(request: GenerationRequest, model: ServedModel, *, begins: bool | None) -> tuple[int, ...]:
    """Encode a prompt.

    Args: begins: whether it begins with the tokenizer's own first tokens; None: if it is a text.
    Raises: InvalidRequest: it cannot be encoded, or only elsewhere.
    """
    prepare = model.engine.prepare
    prepared = await prepare(request)
    ids = prepared.prompt_ids
    if prepared.is_lower_bound:
        limit = model.engine.info.context_length
        raise ContextLengthExceeded(prompt_tokens=prepared.prompt_tokens, max_tokens=0, limit=limit, counted=False)
    if ids is None:
        raise InvalidRequest("The tokenizer of this model is elsewhere.")
    if (not request.is_chat) == (not request.is_chat if begins is None else begins):
        return ids
    nothing = structs.replace(request, messages=(), text="", template_kwargs=(), continue_final_message=False)
    first = (await prepare(nothing)).prompt_ids or ()
    return (*first, *ids) if begins else ids[len(first) :]
