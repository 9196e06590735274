"""The items of a response's input, and how they become messages: several items make one message of the assistant."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from app.errors import InvalidRequest
from app.types import Message, Role, ToolCall
from app.web.http.errors import KIND
from app.web.http.json_body import StrictModel
from app.web.http.sampling_params import check_length
from app.web.http.tool_definitions import ToolName
from app.web.openai.validators import NeutralOnly

MAX_ITEMS = 1024
"""Items of one request; a turn of an agent that calls tools has several."""

ItemId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Status = Literal["in_progress", "completed", "incomplete"]
_TEXT_TYPES = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class ItemText(StrictModel):
    """A text part of an item; those of this service's own responses are taken back as they are."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str
    annotations: Annotated[Any, NeutralOnly([])] = None
    logprobs: Annotated[list[Any] | None, Field(max_length=1_000_000)] = None
    prompt_cache_breakpoint: Annotated[Any, NeutralOnly()] = None


class ItemRefusal(StrictModel):
    """What a model said when it refused."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def kind_by_type(kinds: Mapping[str, str], default: str = "") -> Callable[[Any], str]:
    """Return a discriminator of a union by `type`, which never quotes what the client wrote.

    Args:
        kinds: the tag of each known type, without its prefix.
        default: the type of what has none.
    """

    def tag(value: Any) -> str:
        named = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
        return KIND + kinds[named] if isinstance(named, str) and named in kinds else ""

    return tag


_Part = Annotated[
    Annotated[ItemText, Tag(f"{KIND}text")] | Annotated[ItemRefusal, Tag(f"{KIND}refusal")],
    Discriminator(
        kind_by_type(dict.fromkeys(_TEXT_TYPES, "text") | {"refusal": "refusal"}),
        custom_error_type="unsupported_kind",
        custom_error_message="must be a text part (input_text, output_text or refusal); this model reads text only",
    ),
]
_Parts = Annotated[list[_Part], Field(max_length=MAX_ITEMS)]


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


_Content = Annotated[_Parts, BeforeValidator(_as_parts, json_schema_input_type=str | _Parts)]


class MessageItem(StrictModel):
    """A message of the user, the assistant or the operator."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    id: ItemId | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(StrictModel):
    """A call of a function by the assistant."""

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str
    id: ItemId | None = None
    status: _Status | None = None
    namespace: Annotated[Any, NeutralOnly()] = None
    caller: Annotated[Any, NeutralOnly({"type": "direct"})] = None
    async_: Annotated[Any, NeutralOnly(False), Field(alias="async")] = None


class FunctionCallOutputItem(StrictModel):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: _Content
    id: ItemId | None = None
    name: ToolName | None = None
    status: _Status | None = None
    namespace: Annotated[Any, NeutralOnly()] = None
    caller: Annotated[Any, NeutralOnly({"type": "direct"})] = None


class ReasoningItem(StrictModel):
    """What the assistant thought before the items that follow."""

    type: Literal["reasoning"]
    id: ItemId | None = None
    summary: _Parts | None = None
    content: _Parts | None = None
    encrypted_content: str | None = None
    status: _Status | None = None

    @property
    def text(self) -> str:
        return join_parts(self.content or self.summary or [])


class ItemReference(StrictModel):
    """Names an item of a stored response instead of repeating it."""

    type: Literal["item_reference"]
    id: ItemId


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference
_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
InputItem = Annotated[
    Annotated[MessageItem, Tag(f"{KIND}message")]
    | Annotated[FunctionCallItem, Tag(f"{KIND}function_call")]
    | Annotated[FunctionCallOutputItem, Tag(f"{KIND}function_call_output")]
    | Annotated[ReasoningItem, Tag(f"{KIND}reasoning")]
    | Annotated[ItemReference, Tag(f"{KIND}item_reference")],
    Discriminator(
        kind_by_type({kind: kind for kind in _KINDS}, default="message"),
        custom_error_type="unsupported_kind",
        custom_error_message=f"must be an item of type {', '.join(_KINDS)}; this service has no built-in tools",
    ),
]


def join_parts(content: Sequence[ItemText | ItemRefusal]) -> str:
    """Return the text of an item's content, its parts joined by newlines."""
    return "\n".join(part.text for part in content)


Resolve = Callable[[str], Awaitable[Item | None]]
"""Finds an item of the caller's stored responses by its id."""


async def resolved(items: Sequence[Item], resolve: Resolve, max_chars: int) -> list[Item]:
    """Return the items with those in the place of references that these name.

    Args: max_chars: of all items that are named, in sum.
    Raises: InvalidRequest: what a reference names is not stored (any more), is named twice, or all are too long.
    """
    found = list[Item]()
    named = set[str]()
    chars = 0
    for index, item in enumerate(items):
        if isinstance(item, ItemReference):
            field = f"input.{index}.id"
            if item.id in named:
                raise InvalidRequest.of_field(field, "is named before")
            named.add(item.id)
            known = await resolve(item.id)
            if known is None:
                raise InvalidRequest.of_field(field, "names no item of a stored response of yours")
            chars += sum(len(message.all_text) for message in to_messages([known]))
            check_length("input", chars, max_chars)
            item = known
        found.append(item)
    return found


def to_messages(items: Sequence[Item]) -> list[Message]:
    """Return the messages that items stand for.

    Reasoning, text and calls of the assistant that follow each other are one message, as chat templates expect.
    """
    messages: list[Message] = []
    names: dict[str, str] = {}
    thoughts: list[str] = []

    def reasoning() -> str | None:
        """Return the reasoning that belongs to the next message, and forget it."""
        text = "\n".join(thoughts) or None
        thoughts.clear()
        return text

    def flush() -> None:
        if thoughts:
            messages.append(Message(Role.ASSISTANT, "", reasoning=reasoning()))

    for item in items:
        match item:
            case ReasoningItem():
                thoughts += filter(None, [item.text])
            case MessageItem(role="assistant"):
                messages.append(Message(Role.ASSISTANT, join_parts(item.content), reasoning=reasoning()))
            case FunctionCallItem():
                names[item.call_id] = item.name
                call = ToolCall(item.call_id, item.name, item.arguments)
                flush()
                if not messages or messages[-1].role is not Role.ASSISTANT:
                    messages.append(Message(Role.ASSISTANT, ""))
                messages[-1] = replace(messages[-1], tool_calls=(*messages[-1].tool_calls, call))
            case FunctionCallOutputItem():
                flush()
                name = item.name or names.get(item.call_id)
                messages.append(Message(Role.TOOL, join_parts(item.output), tool_call_id=item.call_id, name=name))
            case MessageItem():
                flush()
                role = Role.SYSTEM if item.role == "developer" else Role(item.role)
                messages.append(Message(role, join_parts(item.content)))
    flush()
    return messages


def input_items(messages: Sequence[Message], new_id: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the items that stand for the messages a client sent.  Args: new_id: returns the id of the next item."""
    items: list[dict[str, Any]] = []
    for message in messages:
        match message.role:
            case Role.TOOL:
                items.append(
                    {
                        "type": "function_call_output",
                        "id": new_id("fco"),
                        "call_id": message.tool_call_id or "",
                        "output": message.content,
                        "status": "completed",
                    }
                )
            case Role.ASSISTANT:
                items += assistant_items(message, new_id)
            case role:
                part = {"type": "input_text", "text": message.content}
                items.append(
                    {
                        "type": "message",
                        "id": new_id("msg"),
                        "role": role.value,
                        "content": [part],
                        "status": "completed",
                    }
                )
    return items


def assistant_items(message: Message, new_id: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the items of one message of the assistant: its reasoning, its text, its calls."""
    items = []
    if message.reasoning:
        items.append(reasoning_item(new_id("rs"), message.reasoning))
    if message.content or not message.tool_calls:
        items.append(message_item(new_id("msg"), message.content))
    items += [call_item(new_id("fc"), call) for call in message.tool_calls]
    return items


def reasoning_item(item_id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """Return the item of what the model thought."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": item_id, "type": "reasoning", "summary": [], "content": content, "status": status}


def text_part(text: str, logprobs: Any = ()) -> dict[str, Any]:
    """Return the part of a message that the model wrote."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def message_item(item_id: str, text: str, status: str = "completed", *, logprobs: Any = ()) -> dict[str, Any]:
    """Return the item of a message that the model wrote."""
    content = [text_part(text, logprobs)] if text or status != "in_progress" else []
    return {"id": item_id, "type": "message", "role": "assistant", "content": content, "status": status}


def call_item(item_id: str, call: ToolCall, status: str = "completed") -> dict[str, Any]:
    """Return the item of a call of a function."""
    return {
        "id": item_id,
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }
