"""Writes grammars in llguidance's dialect of Lark, in which a special token is never matched by text."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from app.grammars.schemas import enforceable_schema

ANY_TEXT = "/(?s:.*)/"
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of a JSON value; without a bound a model can write white space for ever."""


def quoted(text: str) -> str:
    """Return a text as a literal; the empty text as nothing."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def escaped(text: str) -> str:
    """Return a text as a part of a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")


def embedded_schema(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return a JSON Schema as an expression.

    Args: lenient: whether keywords that are not known are left out.
    Raises: GrammarError: it has a keyword that would not be enforced, and is not lenient.
    """
    if not lenient:
        schema = enforceable_schema(dict(schema))
    # Options of the compiler are not the schema's to choose.
    options = {"whitespace_pattern": WHITESPACE} | ({"lenient": True} if lenient else {})
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


class LarkGrammar:
    """The rules of one grammar, and the tokens that stand for marks."""

    def __init__(self, tokens: Iterable[tuple[str, int]]) -> None:
        """Args: tokens: marks that are single tokens, which text does not match; with their ids."""
        self._tokens = dict(tokens)
        self._rules: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def mark(self, mark: str) -> str:
        """Return the expression of a mark."""
        return f"<[{self._tokens[mark]}]>" if mark in self._tokens else quoted(mark)

    def text_up_to(self, mark: str, text: str = "(?s:.*)") -> str:
        """Return the expression of some text and the first mark behind it.

        Args: text: a regular expression of the text; by default it may be any.
        """
        if mark in self._tokens:
            return f"/{text}/ {self.mark(mark)}"
        return self.add("text", f"/{text}{escaped(mark)}/", options="[lazy]")

    def add(self, name: str, body: str, *, options: str = "") -> str:
        """Add a rule and return its name, made unique by a number."""
        unique = f"{name}_{len(self._rules)}"
        self.define(unique, body, options=options)
        return unique

    def define(self, name: str, body: str, *, options: str = "") -> None:
        """Add a rule under exactly this name."""
        self._rules[name] = f"{name}{options}: {body}"

    def render(self, start: str) -> str:
        """Return the whole grammar, which begins with this expression."""
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules.values()])
