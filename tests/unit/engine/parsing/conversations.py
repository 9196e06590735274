"""What goes through the templates and parsers of these tests: tools, a message that uses them, and how to parse one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.engine.base import ChatFormat
from app.engine.parsing.completion_parser import CompletionParser
from app.engine.parsing.formats import marks_of
from app.engine.parsing.output import Part
from app.engine.tokenizer.shown_tokens import show_token
from app.events import join_tool_calls
from app.types import Tool, ToolCall

GOLDEN = Path(__file__).parent / "golden"

WEATHER = Tool(
    "get_weather",
    "The weather of a city",
    '{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, '
    '"unit": {"enum": ["c", "f"]}}, "required": ["city"], "additionalProperties": false}',
)
ADD = Tool(
    "add",
    "Add two numbers",
    '{"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"], '
    '"additionalProperties": false}',
)
TOOLS = (WEATHER, ADD)


@dataclass(frozen=True)
class Parsed:
    """A whole message."""

    text: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments of each."""


def chat_format(tools: str | None, reasoning: str | None = None, *, special: bool = False) -> ChatFormat:
    """Return a format whose marks are text, or special tokens with ids from 1000 on."""
    marks = tuple((mark, 1000 + number) for number, mark in enumerate(marks_of(tools, reasoning)))
    return ChatFormat(tools=tools, reasoning=reasoning, special_marks=marks if special else ())


def as_special(text: str, tools: str | None, reasoning: str | None = None) -> str:
    """Return a completion's text as it is where all marks are special tokens."""
    for mark in sorted(marks_of(tools, reasoning), key=len, reverse=True):
        text = text.replace(mark, f"\0{mark[::-1]}\0")
    for mark in marks_of(tools, reasoning):
        text = text.replace(f"\0{mark[::-1]}\0", show_token(mark))
    return text


def parts_of(parser: CompletionParser, chunks: Iterable[str], *, cut: bool = False) -> list[Part]:
    """Return all parts of a completion that comes in these chunks."""
    parts = [part for chunk in chunks for part in parser.feed(chunk)]
    return parts + parser.finish(cut=cut)


def calls_of(parts: Iterable[Part]) -> tuple[ToolCall, ...]:
    """Return the calls in these parts."""
    return join_tool_calls(part.call for part in parts if part.call is not None)


def parse(
    chat: ChatFormat, chunks: str | Sequence[str], *, tools: Sequence[Tool] = TOOLS, cut: bool = False, **settings: Any
) -> Parsed:
    """Return what a completion becomes."""
    chunks = [chunks] if isinstance(chunks, str) else chunks
    prompt_end = settings.pop("prompt_end", "")
    parser = CompletionParser(chat, {tool.name: tool for tool in tools}, prompt_end, **settings)
    parts = parts_of(parser, chunks, cut=cut)
    return Parsed(
        "".join(part.text for part in parts),
        "".join(part.reasoning for part in parts),
        tuple((call.name, call.arguments) for call in calls_of(parts)),
    )
