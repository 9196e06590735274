"""How a chat template wants an assistant's calls of tools: transformers' way first, and what several real ones need."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from app.engine.tokenizer.tool_prompt import plain_json
from app.types import Message, Role, Tool, ToolCall

PROBE_TOOL = Tool(
    "look_up",
    "Look up a city.",
    '{"type": "object", "properties": {"city": {"type": "string", "description": "Name"}}, "required": ["city"]}',
)
PROBE_CALL = ToolCall("call_0123456789abcdefABCDEF01", PROBE_TOOL.name, '{"city": "Zermatt"}')

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """How calls are written for one template."""

    arguments: Literal["object", "text"] = "object"
    content: Literal["absent", "empty", "null"] = "absent"
    """What the content is where the assistant only calls."""
    short_ids: bool = False
    """Whether ids must have nine letters and digits; others are replaced, the same one always by the same."""
    single: bool = False
    """Whether a message may have one call only."""

    def with_calls(self, fields: dict[str, Any], message: Message) -> dict[str, Any]:
        """Return the fields of a message with its calls."""
        if not message.content:
            fields = {name: value for name, value in fields.items() if name != "content"}
            if self.content != "absent":
                fields["content"] = "" if self.content == "empty" else None
        return {**fields, "tool_calls": [self._call(call) for call in message.tool_calls]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": self._arguments(call.arguments or "{}")}
        described: dict[str, Any] = {"type": "function", "function": function}
        return {"id": self.shown_id(call.id), **described} if call.id else described

    def _arguments(self, text: str) -> Any:
        """Return arguments as the template takes them; a text that was cut stays one."""
        if self.arguments == "text":
            return text
        try:
            value = plain_json(text)
        except ValueError:
            return text
        return value if isinstance(value, dict) else text

    def shown_id(self, call_id: str) -> str:
        """Return the id of a call as the template takes it."""
        if not self.short_ids or _SHORT_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]

    def is_shown(self, text: str, count: int) -> bool:
        """Return whether a rendering has the probe so many times, and its arguments as JSON or in a form of its own."""
        (key, value), *_ = json.loads(PROBE_CALL.arguments).items()
        shown = min(text.count(each) for each in (PROBE_CALL.name, key, value))
        return shown >= count and f"'{key}'" not in text and f'\\"{key}' not in text


CALL_FORMS = tuple(
    CallForm(arguments=arguments, content=content, short_ids=short_ids)
    for short_ids in (False, True)
    for arguments in ("object", "text")
    for content in ("absent", "empty", "null")
)
TRANSFORMERS_FORM = CALL_FORMS[0]
"""What transformers itself gives a template."""


def split_calls(messages: Iterable[Message]) -> list[Message]:
    """Return a conversation in which each call has a message of its own, with its result behind it."""
    turns: list[Message] = []
    waiting: list[Message] = []
    for message in messages:
        if message.role is Role.TOOL and waiting:
            index = next((at for at, each in enumerate(waiting) if each.tool_calls[0].id == message.tool_call_id), 0)
            turns += [waiting.pop(index), message]
            continue
        turns += waiting
        waiting = []
        if len(message.tool_calls) > 1:
            waiting = [
                replace(message, content=message.content if at == 0 else "", reasoning=None, tool_calls=(call,))
                for at, call in enumerate(message.tool_calls)
            ]
            waiting[0] = replace(waiting[0], reasoning=message.reasoning)
        else:
            turns.append(message)
    return turns + waiting
