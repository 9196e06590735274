"""Checks the form of a JSON Schema, so that what is wrong with a tool's parameters is said before a model sees them."""

from collections.abc import Callable, Iterator
from typing import Any

_TYPES = frozenset(["array", "boolean", "integer", "null", "number", "object", "string"])
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose values are objects of schemas."""
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's parameters as they are.

    Raises: ValueError: they are no JSON Schema of an object; the message names the keyword, and quotes nothing.
    """
    if schema.get("type", "object") != "object":
        raise ValueError("must be the JSON Schema of an object")
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, bool):
            continue
        if not isinstance(one, dict):
            raise ValueError("is no JSON Schema: in the place of a schema stands something else")
        for keyword, (holds, form) in _FORMS.items():
            if keyword in one and not holds(one[keyword]):
                raise ValueError(f"is no JSON Schema: {keyword} must be {form}")
        waiting += _subschemas(one)
    return schema


def _subschemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword in _MAPS:
        yield from schema.get(keyword, {}).values()
    for keyword in _LISTS:
        yield from schema.get(keyword, [])
    for keyword in _SCHEMAS:
        if keyword in schema:
            value = schema[keyword]
            yield from value if isinstance(value, list) and keyword == "items" else [value]


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and name in _TYPES for name in names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, "one of JSON Schema's types, or a list of them"),
    "required": (_are_names, "a list of names"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    **dict.fromkeys(_MAPS, (lambda value: isinstance(value, dict), "an object of schemas")),
    **dict.fromkeys(_LISTS, (lambda value: isinstance(value, list), "a list of schemas")),
}
