"""From what a caller asks to what the engine is told: fills in defaults, and refuses what this model cannot do."""

from collections.abc import Sequence
from dataclasses import fields

from app.engine.base import EngineInfo
from app.errors import InvalidRequest
from app.generation.requests import Sampling
from app.types import SamplingParams, SamplingSettings

_GREEDY_BELOW = 0.01
"""Cooler than this the most likely token always wins, and dividing the scores would overflow."""


def settle(sampling: Sampling, info: EngineInfo, *, max_tokens: int, default_temperature: float) -> SamplingParams:
    """Fill in every field.

    Args: max_tokens: what really fits behind the prompt.
    Raises: InvalidRequest: a token that the model does not have, or more tokens at least than at most.
    """
    for field, ids in (
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        check_tokens(field, ids, info)
    if sampling.min_tokens > max_tokens:
        raise InvalidRequest.of_field("min_tokens", f"is more than max_tokens, which is {max_tokens} here")
    temperature = default_temperature if sampling.temperature is None else sampling.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        **{field.name: getattr(sampling, field.name) for field in fields(SamplingSettings)},
    )


def check_tokens(field: str, token_ids: Sequence[int], info: EngineInfo) -> None:
    """Raises: InvalidRequest: one of them is no token of the model; the field is named."""
    if max(token_ids, default=0) >= info.vocab_size:
        last = info.vocab_size - 1
        raise InvalidRequest.of_field(field, f"names a token that the model does not have; its last is {last}")
