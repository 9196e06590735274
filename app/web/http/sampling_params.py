"""Types and bounds of the request fields that the dialects share."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from app.errors import PromptTooLong
from app.requests import RESOLVABLE
from app.types import SamplingParams

MAX_TOKENS = 1_000_000
"""Above every context window; the service checks what fits the model's."""

MAX_BIASES = 300
"""Far more than a request needs; each costs a little at every token."""

MAX_MESSAGES = 256
MAX_PROMPTS = 64

SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
"""Canonical decimals only, so that no token is named twice."""

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def as_list(value: Any) -> Any:
    """Return a single text as a list of one."""
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Return pairs of token id and bias, sorted by id; no message quotes a key, which is the client's text.

    Raises: ValueError: the value is no valid `LogitBias`.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object with token ids for keys")
    if len(value) > MAX_BIASES:
        raise ValueError(f"holds more than {MAX_BIASES} tokens")
    if not all(_TOKEN_ID.fullmatch(key) for key in value):
        raise ValueError("must have token ids for keys, as decimal digits")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("must have numbers from -100 to 100 for values")
    return tuple(sorted((int(key), float(bias)) for key, bias in value.items()))


_BIASES_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "maxProperties": MAX_BIASES,
}
LogitBias = Annotated[
    tuple[tuple[int, float], ...] | None,
    BeforeValidator(_biases),
    WithJsonSchema({"anyOf": [_BIASES_SCHEMA, {"type": "null"}]}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
SampleCount = Annotated[int, Field(ge=1, le=8)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def split_params(given: Mapping[str, Any]) -> tuple[SamplingParams, frozenset[str]]:
    """Return the parameters that a request names, and the names of those that it leaves to the service.

    Args: given: by the names of `SamplingParams`; None is not given.
    """
    named = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**named), RESOLVABLE.difference(named)


def check_length(field: str, length: int, limit: int) -> None:
    """Raises: PromptTooLong: the text has more characters than the service takes."""
    if length > limit:
        raise PromptTooLong(field, length=length, limit=limit)
