"""The grammar of arguments in Gemma's form, from the JSON Schema that they follow.

Knows types, properties, required, items, enum, const, anyOf, oneOf and references; other keywords do not narrow what
may be written.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.engine.parsing.lark import LarkGrammar, quoted
from app.grammars.schemas import listed

INTEGER = "/-?(0|[1-9][0-9]*)/"
NUMBER = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/"
KEY = r"/[\w-]+/"
MAX_VALUES = 2000
"""Values in the schemas of one grammar; further ones may be anything."""
MAX_DEPTH = 50
"""Schemas within each other; what lies deeper may be anything."""


def gemma_arguments(lark: LarkGrammar, schema: Mapping[str, Any], quote: str) -> str:
    """Add the rules of these arguments.  Returns: their expression."""
    return _Values(lark, schema, quote).object(schema)


class _Values:
    """Adds the rules of values; each method returns an expression."""

    def __init__(self, lark: LarkGrammar, root: Mapping[str, Any], quote: str) -> None:
        self._lark = lark
        self._root = root
        self._quote = lark.mark(quote)
        self._text = lark.add("text", f"{self._quote} {lark.text_up_to(quote)}")
        self._references: dict[str, str] = {}
        self._anything = ""
        self._values = 0
        self._depth = 0

    def value(self, schema: Any) -> str:
        self._values += 1
        if self._values > MAX_VALUES or self._depth >= MAX_DEPTH:
            return self._any()
        self._depth += 1
        expression = self._of(schema)
        self._depth -= 1
        return expression

    def _of(self, schema: Any) -> str:
        if not isinstance(schema, dict):
            return self._any()
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"])
        if "const" in schema or schema.get("enum") is not None:
            values = [schema["const"]] if "const" in schema else listed(schema, "enum")
            return self._either([self._constant(each) for each in values])
        for union in ("anyOf", "oneOf"):
            if isinstance(schema.get(union), list):
                return self._either([self.value(each) for each in schema[union]])
        types = schema.get("type")
        return self._either([self._typed(each, schema) for each in (types if isinstance(types, list) else [types])])

    def object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return self._any_object()
        needed = listed(schema, "required")
        entries = [
            (self._lark.add("entry", f"{quoted(name + ':')} {self.value(each)}"), name in needed)
            for name, each in properties.items()
        ]
        return f"{quoted('{')} {self._entries(entries)} {quoted('}')}"

    def _entries(self, entries: Sequence[tuple[str, bool]]) -> str:
        """Return the expression of entries in their order, some of which may be left out."""
        behind, begin = "", ""
        for entry, needed in reversed(entries):
            first = f"{entry} {behind}".strip()
            further = f'"," {first}'
            begin = self._lark.add("first", first if needed else f"{first} | {begin or quoted('') or '()'}")
            behind = self._lark.add("more", further if needed else f"{further} | {behind or '()'}")
        return begin

    def _typed(self, name: Any, schema: Mapping[str, Any]) -> str:
        match name:
            case "string":
                return self._text
            case "integer":
                return INTEGER
            case "number":
                return NUMBER
            case "boolean":
                return '("true" | "false")'
            case "null":
                return '"null"'
            case "array":
                item = self._lark.add("item", self.value(schema.get("items")))
                return f'"[" ({item} ("," {item})*)? "]"'
            case "object":
                return self.object(schema)
        return self._any()

    def _constant(self, value: Any) -> str:
        return f"{self._quote} {quoted(value)} {self._quote}" if isinstance(value, str) else quoted(json.dumps(value))

    def _reference(self, reference: str) -> str:
        if reference not in self._references:
            target: Any = self._root
            for key in reference.removeprefix("#").strip("/").split("/"):
                target = target.get(key) if isinstance(target, dict) else None
            self._references[reference] = rule = f"reference_{len(self._references)}"
            # Named before its body is written, which may refer to it.
            self._lark.define(rule, self.value(target))
        return self._references[reference]

    def _either(self, choices: list[str]) -> str:
        return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"

    def _any(self) -> str:
        if not self._anything:
            self._anything = "anything"
            if self._anything not in self._lark:
                one = f'{self._text} | {NUMBER} | "true" | "false" | "null" | {self._any_object()}'
                self._lark.define("anything", f'{one} | "[" (anything ("," anything)*)? "]"')
        return self._anything

    def _any_object(self) -> str:
        return f'"{{" ({KEY} ":" {self._any()} ("," {KEY} ":" {self._any()})*)? "}}"'
