"""What becomes of the caller's wishes: nothing is lost, and what only the loaded model can judge is refused."""

from dataclasses import fields
from typing import Any

import pytest

from app.engine.base import EngineInfo
from app.errors import InvalidRequest
from app.generation.requests import Sampling
from app.generation.sampling import settle
from app.types import SamplingParams

INFO = EngineInfo("model", None, "echo", "cpu", "none", 2048, 1000, 1)
WISHES: dict[str, Any] = {
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "stop": ("x",),
    "seed": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": ((5, 1.0),),
    "logprobs": 2,
    "stop_token_ids": (6,),
    "ignore_eos": True,
    "min_tokens": 4,
}


def settled(max_tokens: int = 9, **wishes: Any) -> SamplingParams:
    return settle(Sampling(**wishes), INFO, max_tokens=max_tokens, default_temperature=0.7)


def test_every_wish_reaches_the_engine():
    """Each field that a caller may set, under the same name; which of n answers it is, the service says later."""
    assert {field.name for field in fields(SamplingParams)} - {"sample"} == set(WISHES)
    assert {field.name for field in fields(Sampling)} - {"n"} == set(WISHES)
    assert SamplingParams(**WISHES) == settled(**WISHES)


def test_who_wishes_nothing_gets_the_service_s_temperature_and_no_more():
    """All other fields are off."""
    assert SamplingParams(max_tokens=9, temperature=0.7) == settled()


@pytest.mark.parametrize(("asked", "given"), [(0.0, 0.0), (0.009, 0.0), (0.01, 0.01), (2.0, 2.0)])
def test_a_temperature_near_zero_is_zero(asked: float, given: float):
    """Divided by it, scores would overflow; the most likely token wins either way."""
    assert given == settled(temperature=asked).temperature


@pytest.mark.parametrize(
    ("field", "wishes"),
    [
        ("logit_bias", {"logit_bias": ((0, 1.0), (1000, 1.0))}),
        ("stop_token_ids", {"stop_token_ids": (5, 1000)}),
        ("min_tokens", {"min_tokens": 10}),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(field: str, wishes: dict[str, Any]):
    """A token that it does not have; more tokens at least than fit behind this prompt."""
    with pytest.raises(InvalidRequest) as refused:
        settled(**wishes)

    assert [field] == [error["field"] for error in refused.value.details["errors"]]
    assert refused.value.message.startswith(field)


def test_the_limits_themselves_are_allowed():
    """The last token of the vocabulary, and as many tokens at least as at most."""
    params = settled(logit_bias=((999, 1.0),), stop_token_ids=(999,), min_tokens=9)

    assert (((999, 1.0),), (999,), 9) == (params.logit_bias, params.stop_token_ids, params.min_tokens)
