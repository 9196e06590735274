"""Types and bounds of the request fields that the dialects share."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from app.engine.base import Capabilities
from app.errors import PromptTooLong
from app.requests import RESOLVABLE
from app.types import SamplingParams

MAX_TOKENS = 1_000_000
"""Above every context window; the service checks what fits the model's."""

MAX_BIASES = 300
"""Far more than a request needs; each costs a little at every token."""

MAX_MESSAGES = 2048
"""OpenAI's own limit; what a model can read of them its context window says."""

MAX_PROMPTS = 64

SessionId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
"""Canonical decimals only, so that no token is named twice."""

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
TopP = Annotated[float, Field(ge=0, le=1)]
Truncation = Annotated[
    Literal["auto", "disabled"] | None,
    Field(description="auto: the beginning of a prompt that is too long goes, of a chat whole turns."),
]
AdapterField = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=256)] | None,
    Field(description="A LoRA adapter of the model; model may name one, too."),
]
MAX_STOPS = 16


def _stop_texts(value: Any) -> Any:
    """Return a text or texts as a list without empty ones, which stop nothing; None if none is left."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        return texts
    return [text for text in texts if text != ""] or None


_StopText = Annotated[str, StringConstraints(max_length=256)]
_StopTexts = Annotated[list[_StopText], Field(max_length=MAX_STOPS)]
StopTexts = Annotated[
    _StopTexts | None, BeforeValidator(_stop_texts, json_schema_input_type=_StopText | _StopTexts | None)
]
"""Stop strings: a text, or several."""


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

    A nucleus without any probability mass holds the likeliest token alone: `top_p` of 0 is greedy.

    Args: given: by the names of `SamplingParams`; None is not given.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if named.get("top_p") == 0:
        named |= {"top_p": 1.0, "temperature": 0.0}
    return SamplingParams(**named), RESOLVABLE.difference(named)


def supported_params(
    sampling: SamplingParams, unset: frozenset[str], capabilities: Capabilities
) -> tuple[SamplingParams, frozenset[str], list[str]]:
    """Return what `split_params` does without the parameters that a model does not support, and the names of these."""
    neutral = SamplingParams()
    left_out = [name for name in capabilities.unsupported if getattr(sampling, name) != getattr(neutral, name)]
    if not left_out:
        return sampling, unset, left_out
    sampling = replace(sampling, **{name: getattr(neutral, name) for name in left_out})
    return sampling, unset | RESOLVABLE.intersection(left_out), left_out


def check_length(field: str, length: int, limit: int) -> None:
    """Check the characters of a text.  Args: limit: `security.max_prompt_chars`; 0 is none.

    Raises: PromptTooLong.
    """
    if 0 < limit < length:
        raise PromptTooLong(field, length=length, limit=limit)
