"""Fills in the sampling parameters that a request leaves open, and refuses those that the model cannot honour."""

from dataclasses import replace
from typing import Any

from msgspec import structs

from app.engine.base import EngineInfo
from app.engine.served_model import SamplingDefaults
from app.errors import InvalidRequest
from app.requests import GenerationRequest
from app.types import SamplingParams

_GREEDY_BELOW = 0.01
"""Below this temperature the most likely token always wins, and dividing the logits would overflow."""


def resolve_params(
    request: GenerationRequest, info: EngineInfo, defaults: SamplingDefaults, *, max_tokens: int
) -> GenerationRequest:
    """Return the request with every sampling parameter filled in.

    Args: max_tokens: what fits behind the prompt.
    Raises: InvalidRequest: a token that the model does not have, or min_tokens above max_tokens.
    """
    given = request.sampling
    info.check_tokens("logit_bias", [token_id for token_id, _ in given.logit_bias])
    info.check_tokens("stop_token_ids", given.stop_token_ids)
    if given.min_tokens > max_tokens:
        raise InvalidRequest.of_field("min_tokens", f"is more than max_tokens, which is {max_tokens} here")
    filled = _defaults(request, info, defaults) | {"max_tokens": max_tokens}
    filled["min_tokens"] = min(filled.get("min_tokens", given.min_tokens), max_tokens)
    sampling = replace(given, **filled)
    if 0 < sampling.temperature < _GREEDY_BELOW:
        sampling = replace(sampling, temperature=0.0)
    cache = request.cache and (request.cache_random or is_deterministic(sampling))
    return structs.replace(request, sampling=sampling, unset=frozenset(), cache=cache)


def is_deterministic(sampling: SamplingParams) -> bool:
    """Return whether the same request has the same response every time."""
    return sampling.seed is not None or sampling.temperature < _GREEDY_BELOW


def _defaults(request: GenerationRequest, info: EngineInfo, defaults: SamplingDefaults) -> dict[str, Any]:
    """Return a value for each parameter that is unset and not neutral by default."""
    if request.use_recommended:
        unsupported = info.capabilities.unsupported
        known: dict[str, Any] = {"temperature": 1.0}
        known |= {name: value for name, value in info.recommended if name not in unsupported}
        if defaults.openai_temperature is not None:
            known["temperature"] = defaults.openai_temperature
        known |= {name: max(0, int(known[name])) for name in ("top_k", "min_tokens") if name in known}
    else:
        known = {"temperature": defaults.temperature}
    return {name: value for name, value in known.items() if name in request.unset}
