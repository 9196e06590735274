"""What an example of the tiny chat model's text is made of: turns, tools and their calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
"""First character and the one behind the last."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call, as a client describes it."""

    name: str
    description: str
    parameters: dict[str, str]
    """Names to JSON Schema types; all of them are required."""

    def schema(self) -> dict[str, Any]:
        """The tool in the form of OpenAI's requests."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        described = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One message; the model learns to write it where `learn` is true."""

    role: str
    """system, user, assistant or tool; results that follow each other are one turn of the chat template."""
    content: str
    learn: bool = False
    calls: tuple[ToolCall, ...] = ()
    dictated: tuple[Span, ...] = ()
    """Parts of what is written that a grammar forces upon the model, which does not learn them."""

    def message(self) -> dict[str, Any]:
        """The message as a client sends it."""
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in self.calls
        ]
        return {"role": self.role, "content": self.content, **({"tool_calls": calls} if calls else {})}


@dataclass(frozen=True)
class Example:
    """Either a conversation (`turns`) or a plain document (`text`)."""

    turns: tuple[Turn, ...] = ()
    text: str = ""
    given: str = ""
    """What stands before the document and is not learnt: nobody could guess it."""
    tools: tuple[Tool, ...] = ()
    """What the conversation may call."""
