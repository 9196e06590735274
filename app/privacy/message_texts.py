"""The texts in messages and tools, taken out for a filter and put back; in JSON they are its strings.

A filter that saw JSON as a text might mask across a quote, or a number, and what is left would be JSON no more.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from app.privacy.json_redactor import characters_in_json
from app.types import Message, Tool

T = TypeVar("T", Message, Tool)

TEXTS_AT_ONCE = 128
"""The definitions of many tools have thousands; between so many the event loop gets its turn."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


async def map_texts(values: Iterable[T], filtered: Callable[[list[str]], Awaitable[list[str]]]) -> list[T]:
    """Return messages or tools with each of their texts as a filter returns it; every different text is given once.

    Raises: what the filter raises.
    """
    given = list(values)
    texts = list(dict.fromkeys(text for value in given for text in _texts(value)))
    clean: list[str] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        clean += await filtered(texts[start : start + TEXTS_AT_ONCE])
    if clean == texts:
        return given
    replaced = dict(zip(texts, clean, strict=True))
    return [_with_texts(value, replaced) for value in given]


def _texts(value: Message | Tool) -> Iterator[str]:
    if isinstance(value, Tool):
        yield from _strings(value.parameters)
        yield value.description or ""
        return
    yield value.content
    yield from filter(None, (value.reasoning, value.name))
    for call in value.tool_calls:
        yield from _strings(call.arguments)


def _with_texts(value: T, replaced: Mapping[str, str]) -> T:
    if isinstance(value, Tool):
        description = None if value.description is None else replaced[value.description]
        return replace(value, description=description, parameters=_with_strings(value.parameters, replaced))
    return replace(
        value,
        content=replaced[value.content],
        reasoning=value.reasoning and replaced[value.reasoning],
        name=value.name and replaced[value.name],
        tool_calls=tuple(replace(call, arguments=_with_strings(call.arguments, replaced)) for call in value.tool_calls),
    )


def _strings(text: str) -> Sequence[str]:
    """Return the strings of a JSON text, or the text itself where it is none."""
    if not _is_json(text):
        return [text]
    return [json.loads(found[0]) for found in _STRING.finditer(text)]


def _with_strings(text: str, replaced: Mapping[str, str]) -> str:
    if not _is_json(text):
        return replaced[text]

    def string(found: re.Match[str]) -> str:
        before = json.loads(found[0])
        return found[0] if replaced[before] == before else f'"{characters_in_json(replaced[before])}"'

    return _STRING.sub(string, text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
