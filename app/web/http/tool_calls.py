"""Calls of tools in messages, as clients send them back and as responses and streams have them: OpenAI's objects."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired

import msgspec
from pydantic import BeforeValidator, Field, StringConstraints
from typing_extensions import TypedDict

from app.events import Completion, ToolCallDelta
from app.types import ToolCall
from app.web.http.lenient import LenientModel
from app.web.http.tool_definitions import ToolName

MAX_CALLS = 128
"""Of one message."""

AnsweredId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:|/+=-]{1,256}$")]
"""The id of a call as any service makes it; no filter looks into ids, so none can be an address or a sentence."""
CallId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:|/+=-]{0,256}$")]
"""Of a call itself; empty where the client has none."""


def _json_text(value: Any) -> Any:
    """Return arguments that a client sends as an object as the text that they were."""
    return msgspec.json.encode(value).decode() if isinstance(value, dict) else value


class CalledFunction(LenientModel):
    """The function that a call names, and its arguments."""

    name: ToolName
    arguments: Annotated[
        str | None, BeforeValidator(_json_text, json_schema_input_type=str | dict[str, Any] | None)
    ] = Field(None, description="JSON, as the model wrote it.")


def _function_only(value: Any) -> Any:
    if value == "custom":
        raise ValueError("custom tools are not supported by this service, which takes only function")
    return "function" if value is None else value


FunctionType = Annotated[
    Literal["function"], BeforeValidator(_function_only, json_schema_input_type=Literal["function"] | None)
]


class ToolCallFields(LenientModel):
    """One call of a message."""

    harmless: ClassVar[frozenset[str]] = frozenset(["index", "cache_control", "provider_specific_fields"])

    id: CallId | None = None
    type: FunctionType = "function"
    function: CalledFunction


Calls = Annotated[list[ToolCallFields], Field(max_length=MAX_CALLS)]


def to_calls(fields: Iterable[ToolCallFields]) -> tuple[ToolCall, ...]:
    """Return the calls of a message."""
    return tuple(ToolCall(each.id or "", each.function.name, each.function.arguments or "") for each in fields)


class FunctionObject(TypedDict):
    """The function that a call names, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallObject(TypedDict):
    """One call of a message."""

    id: str
    type: Literal["function"]
    function: FunctionObject


class ReasonedFields(TypedDict):
    """The fields of a message in which the model thinks or calls; each is left out where it does not."""

    tool_calls: NotRequired[list[ToolCallObject]]
    reasoning_content: NotRequired[str]
    """What the model thought before it answered."""


def tool_call_objects(calls: Sequence[ToolCall]) -> list[ToolCallObject]:
    """Return the calls of a whole message."""
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]


def reasoned_fields(completion: Completion) -> ReasonedFields:
    """Return what a completion has beside its text."""
    fields: ReasonedFields = {}
    if completion.reasoning:
        fields["reasoning_content"] = completion.reasoning
    if completion.tool_calls:
        fields["tool_calls"] = tool_call_objects(completion.tool_calls)
    return fields


def tool_call_deltas(parts: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """Return parts of calls as a stream has them: only the first part of a call has its id, type and name."""
    return [_delta(part) for part in parts]


def _delta(part: ToolCallDelta) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.position, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.position, "id": part.id, "type": "function", "function": function}
