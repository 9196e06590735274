"""What of a JSON Schema can be enforced while a value is written.

llguidance refuses most of what it does not enforce.  The rest is decided here: formats that no standard defines say
nothing, as JSON Schema has it, and what would be enforced only in part is refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

Schema = Any
"""A JSON Schema: an object or a boolean."""

_SUBSCHEMA: Final = (
    "additionalItems additionalProperties contains else if items not propertyNames then "
    "unevaluatedItems unevaluatedProperties"
).split()
_SUBSCHEMA_LISTS: Final = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_SUBSCHEMA_MAPS: Final = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")

ENFORCED_FORMATS: Final = frozenset("date date-time duration email hostname ipv4 ipv6 time uri uuid".split())
_OTHER_STANDARD_FORMATS: Final = frozenset(
    "idn-email idn-hostname iri iri-reference json-pointer regex relative-json-pointer".split()
) | {"uri-reference", "uri-template"}
"""Formats that JSON Schema defines and nothing here enforces; any other one is an annotation."""


_LEAP_YEAR: Final = "[0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00"
_DAYS: Final = (
    f"^([0-9]{{4}}-(0[13-9]|1[0-2])-|[0-9]{{4}}-02-([01][0-9]|2[0-8])|({_LEAP_YEAR})-02-29)",
    "^([1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])-",
)
_WORD: Final = "[A-Za-z0-9_+-]"
_LABEL: Final = "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_SECONDS: Final = "^([0-9-]+[Tt ])?[0-9]{2}:[0-9]{2}:[0-5]"
_NARROWER: Final = {
    "date": _DAYS,
    "date-time": (*_DAYS, _SECONDS),
    "time": (_SECONDS,),
    "email": (rf"^{_WORD}{{1,16}}(\.{_WORD}{{1,15}}){{0,3}}@{_LABEL}(\.{_LABEL}){{0,5}}$",),
}
"""What the compiler's own expressions for formats leave out: days that a year does not have, the year 0, leap seconds,
which are the last of a day in UTC.  The form of ordinary addresses bounds the lengths of their parts."""
_ESCAPE_OR_CLASS: Final = re.compile(r"\\.|[\[\]]", re.DOTALL)
_WHITE_SPACE: Final = r"\t\n\x0B\f\r "
"""The white space that every dialect of expressions has."""


class GrammarError(ValueError):
    """A grammar cannot be enforced; the message continues the name of the field that holds it."""


def listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    """Return the list of a keyword; an empty one where the schema does not have it, or null.

    Raises: GrammarError: it is something else.
    """
    value = schema.get(keyword)
    if value is None:
        return []
    if not isinstance(value, list):
        raise GrammarError(f"has a `{keyword}` that is not a list")
    return value


def enforceable_schema(schema: Schema) -> dict[str, Any]:
    """Return a schema without what means nothing, with all that remains to be enforced by the compiler.

    Raises: GrammarError: it has something that would not be enforced.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise GrammarError("must be an object")
    # Options of the compiler, which are the service's to choose.
    rewritten: dict[str, Any] = _rewrite({key: value for key, value in schema.items() if key != "x-guidance"})
    return rewritten


def _rewrite(schema: Schema) -> Any:
    if not isinstance(schema, dict):
        return schema
    _check(schema)
    written = dict(schema)
    if isinstance(schema.get("format"), str) and schema["format"] not in ENFORCED_FORMATS - {"email"}:
        del written["format"]
    if isinstance(schema.get("format"), str) and schema["format"] in _NARROWER:
        narrower = [{"pattern": pattern} for pattern in _NARROWER[schema["format"]]]
        written["allOf"] = [*listed(schema, "allOf"), *narrower]
    if isinstance(schema.get("pattern"), str):
        written["pattern"] = plain_white_space(schema["pattern"])
    for key, value in schema.items():
        if key in _SUBSCHEMA_LISTS and isinstance(value, list):
            written[key] = [*map(_rewrite, value), *written[key][len(value) :]]
        elif key in _SUBSCHEMA_MAPS and isinstance(value, dict):
            by_pattern = key == "patternProperties"
            written[key] = {plain_white_space(n) if by_pattern else n: _rewrite(each) for n, each in value.items()}
        elif key in _SUBSCHEMA:
            written[key] = _rewrite(value)
    return written


def plain_white_space(pattern: str) -> str:
    r"""Return an expression of JSON Schema with `\s` written out, since its dialect and the compiler's differ there."""
    inside = False

    def write(found: re.Match[str]) -> str:
        nonlocal inside
        if found[0] in "[]":
            inside = found[0] == "["
        elif found[0] == r"\s":
            return _WHITE_SPACE if inside else f"[{_WHITE_SPACE}]"
        return found[0]

    return _ESCAPE_OR_CLASS.sub(write, pattern)


def _check(schema: dict[str, Any]) -> None:
    for reason in filter(None, (check(schema) for check in _CHECKS)):
        raise GrammarError(reason)


def _standard_format(schema: dict[str, Any]) -> str | None:
    name = schema.get("format")
    known = isinstance(name, str) and name in _OTHER_STANDARD_FORMATS
    return f"uses the `format` {name}, which is not supported" if known else None


def _boolean_bound(schema: dict[str, Any]) -> str | None:
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(name), bool):
            return f"uses `{name}` with a boolean, which JSON Schema has given up; it must be a number"
    return None


def _uncounted_properties(schema: dict[str, Any]) -> str | None:
    # A name that is written twice would count twice, though a reader keeps one of the two.
    least, required = schema.get("minProperties"), schema.get("required")
    known = len({name for name in required if isinstance(name, str)}) if isinstance(required, list) else 0
    if isinstance(least, int) and least > max(1, known):
        return "uses `minProperties` above the number of `required` properties, which is not supported"
    return None


_CHECKS: Final[tuple[Callable[[dict[str, Any]], str | None], ...]] = (
    _standard_format,
    _boolean_bound,
    _uncounted_properties,
)
