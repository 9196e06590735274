"""Writes tools, calls and results as text in the Hermes form, for chat templates that show none."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from app.types import Tool, ToolCall

_INTRODUCTION = (
    "You may call functions to answer. Their signatures are within <tools> and </tools>:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as JSON within <tool_call> and </tool_call>:\n"
    '<tool_call>\n{{"name": <name>, "arguments": <arguments>}}\n</tool_call>\n'
    "Results come back within <tool_response> and </tool_response>."
)


def definition(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's form, which is what chat templates read; what was left out stays out."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": plain_json(tool.parameters)}}


def tools_text(tools: Sequence[Tool]) -> str:
    """Return the system text that tells a model of its tools."""
    lines = "\n".join(json.dumps(definition(tool), ensure_ascii=False) for tool in tools)
    return _INTRODUCTION.format(tools=lines)


def calls_text(content: str, calls: Iterable[ToolCall]) -> str:
    """Return what an assistant said with its calls behind it."""
    written = [
        f'<tool_call>\n{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {call.arguments or "{}"}}}\n'
        "</tool_call>"
        for call in calls
    ]
    return "\n".join([*([content] if content else []), *written])


def result_text(content: str) -> str:
    """Return what a tool said as a part of the user's message."""
    return f"<tool_response>\n{content}\n</tool_response>"


def plain_json(text: str) -> Any:
    """Return a JSON text's value, in which every number fits 64 bits.

    Raises: ValueError: it is not JSON.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
