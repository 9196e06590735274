"""What every client program asks of the service: the same four things, in the client's own words.

Imported by programs that run in the client's own environment, so it needs nothing but Python.
"""

import os
import sys
from typing import Any

BASE_URL = os.environ["OPENAI_BASE_URL"]
KEY = os.environ["OPENAI_API_KEY"]
MODEL = "tiny-chat"

CHAT = "What is the capital of France?"
CHAT_ANSWER = "Paris"

TOOL_QUESTION = "What is the weather in London?"
TOOL_NAME = "get_weather"
TOOL_DESCRIPTION = "Get the weather in a city."
TOOL_RESULT = "foggy"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": TOOL_NAME, "description": TOOL_DESCRIPTION, "parameters": PARAMETERS},
}

RECORD_QUESTION = "My name is Tovin and I am 7 years old. Answer as JSON with name and age."
RECORD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def user(text: str) -> list[Any]:
    """Return a conversation of one question."""
    return [{"role": "user", "content": text}]


def check(what: str, expected: object, found: object) -> None:
    """Print a line, and end the program where `expected` is not in `found`."""
    right = str(expected) in str(found)
    sys.stdout.write(f"{'ok  ' if right else 'FAIL'} {what} | {str(found)[:200]!r}\n")
    if not right:
        raise SystemExit(f"{what}: expected {expected!r} in {found!r}")


def check_record(name: object, age: object) -> None:
    """Check a structured answer to `RECORD_QUESTION`."""
    check("structured answer", ("Tovin", 7), (name, age))
