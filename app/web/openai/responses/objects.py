"""The objects that the Responses API returns, as their schemas describe them."""

from typing import Any, Literal

from typing_extensions import TypedDict

from app.web.http.tool_definitions import ChosenTools
from app.web.openai.responses.request_model import ResponseRequest


class InputTokensDetails(TypedDict):
    """How the prompt's tokens were computed."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """How the output's tokens were used."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(TypedDict):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(TypedDict):
    """Why a response breaks off."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseObject(TypedDict):
    """OpenAI's response object."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    model: str
    instructions: str | None
    metadata: dict[str, str]
    previous_response_id: str | None
    conversation: dict[str, str] | None
    store: bool
    background: Literal[False]
    temperature: float | None
    top_p: float | None
    top_logprobs: int
    max_output_tokens: int | None
    max_tool_calls: None
    parallel_tool_calls: bool
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["auto", "disabled"]
    service_tier: str
    prompt_cache_key: str | None
    safety_identifier: str | None
    user: str | None


class DeletedResponse(TypedDict):
    """Says that a response is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(TypedDict):
    """A page of a response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


def _choice_object(chosen: ChosenTools | None) -> str | dict[str, Any]:
    """Return what the request says of the choice among its tools, as OpenAI writes it."""
    if chosen is None:
        return "auto"
    named = [{"type": "function", "name": name} for name in chosen.names or ()]
    if chosen.one:
        return named[0]
    return {"type": "allowed_tools", "mode": chosen.mode, "tools": named} if named else chosen.mode


def described(body: ResponseRequest, *, model: str, stored: bool) -> dict[str, Any]:
    """Return the fields of a response object that are known before its generation.

    Args: stored: whether the response can be shown and continued later.
    """
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    return {
        "model": model,
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "previous_response_id": body.previous_response_id,
        "conversation": None if body.session_id is None else {"id": body.session_id},
        "store": stored,
        "background": False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs or 0,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters or {},
                "strict": bool(tool.strict),
            }
            for tool in body.tools or ()
        ],
        "tool_choice": _choice_object(body.tool_choice),
        "text": {"format": {"type": "text"}, **text},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "truncation": body.truncation or "disabled",
        "service_tier": "default",
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "user": body.user,
    }
