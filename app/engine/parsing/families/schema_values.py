"""Writes values that a model gives as bare text as JSON, by the types of the tool's schema."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from app.engine.parsing.scanner import Write

MAX_UNIONS = 8
"""Unions within each other that are looked at."""


def properties_of(parameters: str) -> Mapping[str, Any]:
    """Return the properties of a JSON Schema; none where it has no usable ones."""
    try:
        properties = json.loads(parameters).get("properties")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return properties if isinstance(properties, dict) else {}


def types_of(schema: Any, *, depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty where it does not say, or in unions within too many others."""
    if not isinstance(schema, dict) or depth > MAX_UNIONS:
        return frozenset()
    declared = schema.get("type")
    declared = declared if isinstance(declared, list) else [declared]
    types = {each for each in declared if isinstance(each, str)}
    for union in ("anyOf", "oneOf"):
        choices = schema.get(union)
        for choice in choices if isinstance(choices, list) else ():
            types |= types_of(choice, depth=depth + 1)
    if not types and isinstance(schema.get("enum"), list):
        types = {_TYPES[type(value)] for value in schema["enum"] if type(value) in _TYPES}
    return frozenset(types)


_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", dict: "object"}


def as_json(raw: str, types: frozenset[str]) -> str:
    """Return a value in JSON: as one of these types if it can be, else as a string."""
    text = raw.strip()
    if types == {"string"}:
        return json.dumps(raw, ensure_ascii=False)
    literal = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        value = json.loads(literal, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    if isinstance(value, str) and not types:
        return json.dumps(raw, ensure_ascii=False)
    if types and not types & _names(value):
        return json.dumps(raw, ensure_ascii=False)
    return literal


def _refuse(constant: str) -> NoReturn:
    """Raises: ValueError: JSON has neither NaN nor infinities."""
    raise ValueError(constant)


def _names(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        whole = isinstance(value, int) or value.is_integer()
        return {"number", "integer"} if whole else {"number"}
    if isinstance(value, list):
        return {"array"}
    return {_TYPES[type(value)]}


class ValueWriter:
    """Writes one property as it comes: text at once, anything else when all of it is there.

    One newline on each side of the value is the format's.
    """

    def __init__(self, write: Write, key: str, schema: Any, *, first: bool) -> None:
        """Begin.  Args: first: whether it is the object's first property."""
        self._write = write
        self._types = types_of(schema)
        self._streams = self._types == {"string"}
        self._held = ""
        self._begun = False
        write(("{" if first else ", ") + json.dumps(key, ensure_ascii=False) + (': "' if self._streams else ": "))

    def write(self, text: str) -> None:
        """Append text of the value."""
        text = self._held + text
        if not self._begun:
            if text == "\r":
                self._held = text
                return
            text = text.removeprefix("\r").removeprefix("\n")
            self._begun = True
        if not self._streams:
            self._held = text
            return
        shown = text.removesuffix("\n").removesuffix("\r")
        self._held = text[len(shown) :]
        self._write(_escaped(shown))

    def finish(self, *, whole: bool) -> None:
        """End the value.  Args: whole: whether it was closed; one that breaks off stays as it is."""
        if self._streams:
            self._write('"' if whole else "")
        else:
            text = self._held.removesuffix("\n").removesuffix("\r")
            self._write(as_json(text, self._types) if whole else text)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
