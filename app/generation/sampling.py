"""From what a caller asks to what the engine is told: fills in defaults, and refuses what this model cannot do."""

from app.engine.base import EngineInfo
from app.errors import InvalidRequest
from app.generation.asks import Sampling
from app.types import Params

_GREEDY_BELOW = 0.01
"""Cooler than this the most likely token always wins, and dividing the scores would overflow."""


def settle(sampling: Sampling, info: EngineInfo, *, max_tokens: int, default_temperature: float) -> Params:
    """Fill in every field.

    Args: max_tokens: what really fits behind the prompt.
    Raises: InvalidRequest: a token that the model does not have, or more tokens at least than at most.
    """
    for field, ids in (
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if max(ids, default=0) >= info.vocab_size:
            raise wrong_field(field, f"names a token that the model does not have; its last is {info.vocab_size - 1}")
    if sampling.min_tokens > max_tokens:
        raise wrong_field("min_tokens", f"is more than max_tokens, which is {max_tokens} here")
    temperature = default_temperature if sampling.temperature is None else sampling.temperature
    return Params(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= _GREEDY_BELOW else 0.0,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        stop=sampling.stop,
        seed=sampling.seed,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
    )


def wrong_field(field: str, reason: str) -> InvalidRequest:
    """Say of one field why it is wrong; `reason` goes on after the field's name."""
    return InvalidRequest(f"{field} {reason}", details={"errors": [{"field": field, "reason": reason}]})
