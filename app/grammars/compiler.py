"""Compile a `Grammar` into the text that llguidance reads, and say why one cannot be enforced.

Both sides use it: the API process to refuse a grammar before anything is generated, the worker to enforce it.  What it
says of a grammar names keywords and places, and never quotes it.
"""

import json
import re
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from app.grammars.schemas import GrammarError, enforceable_schema
from app.types import Grammar

MAX_GRAMMAR_CHARS: Final = 100_000
"""Far more than the schemas of real programs have; what a smaller one may cost is bounded by `LIMITS`."""
WHITESPACE: Final = r"\x20|\n\x20{0,8}"
"""Between the parts of a JSON value: what people and programs write.  A small model that may write more white space
writes little else."""
TOO_COMPLEX: Final = "is too complex"
"""The reason of a grammar that met one of `LIMITS`."""
LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms at the library's own 50,000 in a millisecond
    step_lexer_fuel=200_000,  # 14 ms
    step_max_items=50_000,  # 2.5 ms
    max_lexer_states=50_000,  # 100 MB at most
    max_grammar_size=200_000,
    verbose_errors=False,  # they would quote the grammar
)
"""What one grammar may cost to compile, and one step of it."""

_POSITION = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
_KEYWORDS = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_FORMAT = re.compile(r"Unknown format: (\S{1,40})")
_PARSER_ERROR = re.compile(r"^error: ([a-z ,()-]{1,120})", re.MULTILINE)
_TOO_LARGE = re.compile(r"too (?:big|large|many|complex)|fuel exhausted|[Uu]nable to determine", re.ASCII)
_KNOWN: Final = (
    ("oneOf constraints", "has alternatives of `oneOf` that may both hold, which is not supported; use `anyOf`"),
    ("Unsatisfiable schema", "cannot be satisfied by any value"),
    ("is not present in a registry", "has a `$ref` to another document, which is not supported"),
    ("Pointer '", "has a `$ref` to a place that does not exist"),
    ("Invalid type", "has a `type` that JSON does not have"),
    ("are not disjoint", "has `patternProperties` that overlap, which is not supported"),
    ("invalid multiple", "has a `multipleOf` that is not supported"),
    ("unknown special token", "names a special token that the model does not have"),
    ("unknown name", "uses a rule that it does not define"),
    ("circular reference", "has a terminal that contains itself"),
    ("too deeply nested", "is nested too deeply"),
)


def compile_text(grammar: Grammar) -> str:
    """Return a grammar as llguidance reads it.

    Raises: GrammarError: it is too long, or a schema has something that cannot be enforced.
    """
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"is longer than {MAX_GRAMMAR_CHARS} characters")
    match grammar.kind:
        case "json_schema":
            schema = enforceable_schema(_parsed(grammar.text))
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(_as_lark(grammar.text))


def create_matcher(vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a matcher at the beginning of a completion.

    Raises: GrammarError: the grammar cannot be enforced, or nothing that this vocabulary spells satisfies it.
    """
    try:
        matcher = LLMatcher(vocabulary, compile_text(grammar), log_level=0, limits=LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the Rust library's, and no Exception
            raise
        raise GrammarError("cannot be enforced") from None
    if matcher.is_error():
        raise GrammarError(reason_of(matcher.get_error()))
    return matcher


def reason_of(message: str) -> str:
    """Return what is wrong with a grammar, as a continuation of its field's name, from a message of llguidance."""
    if found := _KEYWORDS.search(message):
        names = ", ".join(f"`{name}`" for name in json.loads(found[1]))
        return f"uses {names}, which is not supported"
    if found := _FORMAT.search(message):
        return "uses a `format` that is not supported"
    place = f" (line {found[1]}, column {found[2]})" if (found := _POSITION.match(message)) else ""
    for words, reason in _KNOWN:
        if words in message:
            return reason + place
    if "NoExtension" in message:
        return "cannot be satisfied by any text"
    if "regex parse error" in message:
        said = _PARSER_ERROR.search(message)
        return f"has an expression that is not valid or not supported{f': {said[1]}' if said else ''}"
    if _TOO_LARGE.search(message):
        return TOO_COMPLEX
    return f"cannot be enforced{place}"


def _as_lark(text: str) -> str:
    """Return a grammar in Lark's form, whichever of the two usual forms it has."""
    try:
        return str(any_to_lark(text))
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001  # errors of the conversion, which quote the grammar
        raise GrammarError("is neither valid in Lark's form nor in GBNF") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise GrammarError("is not valid JSON") from None
