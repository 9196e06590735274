"""JSON Schemas of all kinds that can be enforced, made by combining the keywords of each type."""

from collections.abc import Iterator
from itertools import product
from typing import Any

Schema = dict[str, Any]

NUMBERS: list[Schema] = [
    {},
    {"minimum": 0},
    {"maximum": -3},
    {"minimum": -5, "maximum": 300},
    {"exclusiveMinimum": 7, "exclusiveMaximum": 9},
    {"minimum": 1000, "maximum": 1010},
    {"multipleOf": 3},
    {"multipleOf": 5, "minimum": 12, "maximum": 99},
]
FRACTIONS: list[Schema] = [
    {"minimum": 0.25, "exclusiveMaximum": 0.5},
    {"exclusiveMinimum": -1.5},
    {"multipleOf": 0.5},
    {"minimum": -0.001, "maximum": 0.001},
]
STRINGS: list[Schema] = [
    {},
    {"minLength": 3},
    {"maxLength": 2},
    {"minLength": 2, "maxLength": 4},
    {"pattern": "^[a-c]{2,5}$"},
    {"pattern": "x"},
    {"pattern": r"^\d+(\.\d{2})?$"},
    {"pattern": r"^\w+\s[\s-]$"},
    {"pattern": "^é+ß?$"},
    {"pattern": "^[Α-Ω]{1,3}$"},
    {"pattern": "^(yes|no)$", "maxLength": 2},
]
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
CONSTANTS: list[Any] = [0, -1.5, "", 'a"\\', "ü🙂", None, True, [], [1, "a"], {}, {"a": {"b": None}}, "\u2028\u0085"]
ENUMS: list[list[Any]] = [
    ["a"],
    ["red", "green", "blue"],
    [1, 2, 3],
    [None, "x", 3, True],
    [{"k": 1}, [2]],
    ["a", "ab", "abc"],
]
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def _scalars() -> Iterator[Schema]:
    yield from ({"type": kind, **rest} for kind, rest in product(("integer", "number"), NUMBERS))
    yield from ({"type": "number", **rest} for rest in FRACTIONS)
    yield from ({"type": "string", **rest} for rest in STRINGS)
    yield from ({"type": "string", "format": name} for name in FORMATS)
    yield from ({"type": "string", "format": name} for name in ("password", "binary", "color"))
    yield from ({"const": value} for value in CONSTANTS)
    yield from ({"enum": values} for values in ENUMS)
    yield from ({"type": kind} for kind in TYPES)
    yield from ({"type": [one, other]} for one, other in product(TYPES[:4], TYPES[4:]))
    yield {"title": "A", "description": "b", "default": 1, "examples": [2], "deprecated": True, "type": "integer"}
    yield {"type": "string", "contentEncoding": "base64", "$comment": "c", "readOnly": True, "nullable": True}


def _arrays() -> Iterator[Schema]:
    items: list[Schema] = [
        {"type": "integer"},
        {"type": "string", "maxLength": 3},
        {"enum": ["a", "b"]},
        {"type": "null"},
    ]
    bounds: list[Schema] = [
        {},
        {"minItems": 2},
        {"maxItems": 2},
        {"minItems": 1, "maxItems": 3},
        {"minItems": 2, "maxItems": 2},
    ]
    yield from ({"type": "array", "items": each, **bound} for each, bound in product(items, bounds))
    for more in (True, False, {"type": "boolean"}):
        yield {"type": "array", "prefixItems": items[:2], "items": more, "minItems": 2}
        yield {"type": "array", "prefixItems": items[1:], "items": more, "maxItems": 3}
    yield {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}, "maxItems": 2}


def _objects() -> Iterator[Schema]:
    named: Schema = {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}
    extras: list[Any] = [None, True, False, {"type": "integer"}]
    for required, extra in product(([], ["name"], ["n"], ["name", "n"]), extras):
        yield {"type": "object", "properties": named, "required": required} | (
            {} if extra is None else {"additionalProperties": extra}
        )
    yield {"type": "object", "required": ["a", "b"]}
    yield {"type": "object", "maxProperties": 2, "additionalProperties": {"type": "null"}}
    yield {"type": "object", "minProperties": 1, "maxProperties": 1}
    yield {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}
    yield {"type": "object", "patternProperties": {"^x": {"type": "null"}, "^y": {"type": "boolean"}}}
    yield {
        "type": "object",
        "properties": {'qu"ote': {"type": "null"}, "ключ": {"const": 1}},
        "required": ['qu"ote', "ключ"],
    }
    for inner in (*_unions(), {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2}):
        yield {"type": "object", "properties": {"in": inner}, "required": ["in"], "additionalProperties": False}


def _unions() -> Iterator[Schema]:
    text, count = {"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 0}
    yield {"anyOf": [text, count]}
    yield {"anyOf": [text, {"type": "null"}]}
    yield {"oneOf": [text, count, {"type": "boolean"}]}
    yield {"oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]}
    yield {"allOf": [{"type": "string"}, {"minLength": 2}, {"maxLength": 3}]}
    yield {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 20}, {"multipleOf": 4}]}
    yield {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "v": value}, "required": ["kind", "v"]}
            for kind, value in (("text", text), ("count", count))
        ],
        "discriminator": {"propertyName": "kind"},
    }


def _references() -> Iterator[Schema]:
    tree: Schema = {
        "type": "object",
        "properties": {
            "v": {"type": "integer", "minimum": 0, "maximum": 9},
            "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    yield {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    yield {"$ref": "#/definitions/word", "definitions": {"word": {"type": "string", "pattern": "^[a-z]+$"}}}
    yield {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3, "$defs": {"n": {"type": "null"}}}
    yield {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}]}
    yield {"$ref": "#/$defs/a%25b/c~1d", "$defs": {"a%b": {"c/d": {"type": "boolean"}}}}
    yield {"$defs": {"n": {"type": "integer"}}, "allOf": [{"$ref": "#/$defs/n"}, {"minimum": 3, "maximum": 5}]}


def _nested() -> Iterator[Schema]:
    """Each scalar inside of an object and of an array."""
    for scalar in _scalars():
        yield {"type": "object", "properties": {"v": scalar}, "required": ["v"], "additionalProperties": False}
        yield {"type": "array", "prefixItems": [scalar], "items": False, "minItems": 1}


def all_schemas() -> list[Schema]:
    """Return more than 300 schemas, the same each time."""
    return [*_scalars(), *_arrays(), *_objects(), *_unions(), *_references(), *_nested()]
