"""Validators of OpenAI's request fields: unsupported fields, metadata, and prompts of text or token ids."""

import json
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


class NeutralOnly:
    """Marks an unsupported field, which accepts null and the given neutral values and rejects all others by name."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral
        accepted = " or ".join(map(json.dumps, neutral))
        self._reason = f"is not supported by this service{f', which takes only {accepted}' if accepted else ''}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self._neutral]}

    def _check(self, value: Any) -> Any:
        # The type is compared too: in Python 1 == True and 1.0 == 1.
        if value is None or any(type(value) is type(each) and value == each for each in self._neutral):
            return value
        raise ValueError(self._reason)


def _metadata(value: Any) -> Any:
    """Check the metadata; no message quotes a key, which is the client's text."""
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError("must be an object whose values are texts")
    if len(value) > 16:
        raise ValueError("holds more than 16 pairs")
    if any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError("holds a key of more than 64 characters or a value of more than 512")
    return value


Metadata = Annotated[dict[str, str] | None, BeforeValidator(_metadata, json_schema_input_type=dict[str, str] | None)]


def _prompts(value: Any) -> Any:
    """Return a list of prompts, each a text or a tuple of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if _are_tokens(value):
            return (tuple(value),)
        if all(isinstance(each, list) and each and _are_tokens(each) for each in value):
            return tuple(tuple(each) for each in value)
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")


def _are_tokens(values: list[Any]) -> bool:
    return all(type(each) is int and 0 <= each < 2**31 for each in values)


Prompts = Annotated[
    tuple[str | tuple[int, ...], ...],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
