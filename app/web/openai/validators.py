"""Validators of OpenAI's request fields: unsupported fields, metadata, and prompts of text or token ids."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from app.web.http.sampling_params import MAX_PROMPTS, TokenId
from app.web.http.validation import unsupported

MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
"""Limits of the metadata, OpenAI's own."""


class NeutralOnly:
    """Marks an unsupported field, which accepts null and the given neutral values and rejects all others by name.

    Its error is the one that `openai.unknown_fields: ignore` takes as a field to leave out.
    """

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral
        accepted = " or ".join(map(json.dumps, neutral))
        self._reason = f"is not supported by this service{f', which takes only {accepted}' if accepted else ''}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._neutral]}

    def _check(self, value: Any) -> Any:
        # In Python 1 == True; 1.0 is 1 in JSON, too.
        if value is None or any(
            isinstance(value, bool) is isinstance(each, bool) and value == each for each in self._neutral
        ):
            return value
        raise unsupported(self._reason)


def _metadata(value: Any) -> Any:
    """Check the metadata; no message quotes a key, which is the client's text."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError("must be an object whose values are texts")
    if len(value) > MAX_PAIRS:
        raise ValueError(f"holds more than {MAX_PAIRS} pairs")
    if any(len(key) > MAX_KEY_CHARS or len(text) > MAX_VALUE_CHARS for key, text in value.items()):
        raise ValueError(
            f"holds a key of more than {MAX_KEY_CHARS} characters or a value of more than {MAX_VALUE_CHARS}"
        )
    return value


_METADATA_SCHEMA = {
    "type": "object",
    "propertyNames": {"maxLength": MAX_KEY_CHARS},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE_CHARS},
    "maxProperties": MAX_PAIRS,
}
Metadata = Annotated[
    dict[str, str] | None,
    BeforeValidator(_metadata),
    WithJsonSchema({"anyOf": [_METADATA_SCHEMA, {"type": "null"}]}),
]


def prompts(value: Any) -> Any:
    """Return a tuple of prompts, each a text or a tuple of token ids.

    Raises: ValueError: the value is no such thing.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if _are_tokens(value):
            return (tuple(map(int, value)),)
        if all(isinstance(each, list) and each and _are_tokens(each) for each in value):
            return tuple(tuple(map(int, each)) for each in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")


def _are_tokens(values: list[Any]) -> bool:
    return all(
        (type(each) is int or (type(each) is float and each.is_integer())) and 0 <= each < 2**31 for each in values
    )


_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
_TokenLists = Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    Field(max_length=MAX_PROMPTS),
    BeforeValidator(prompts, json_schema_input_type=str | _Texts | _TokenIds | _TokenLists),
]
