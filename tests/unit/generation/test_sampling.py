"""What becomes of sampling parameters: none is lost, and what only the loaded model can judge is refused."""

from dataclasses import fields, replace
from typing import Any

import pytest

from app.engine.base import Capabilities, EngineInfo
from app.engine.served_model import SamplingDefaults
from app.errors import InvalidRequest
from app.generation.sampling import is_deterministic, resolve_params
from app.requests import GenerationRequest
from app.types import Grammar, SamplingParams
from tests.unit.generation.services import complete

INFO = EngineInfo(
    model="model",
    engine="echo",
    context_length=2048,
    vocab_size=1000,
    recommended=(("temperature", 0.6), ("top_p", 0.95), ("top_k", 20.0), ("min_p", 0.05), ("repetition_penalty", 1.1)),
)
DEFAULTS = SamplingDefaults(max_tokens=100, temperature=0.7)
GIVEN: dict[str, Any] = {
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
    "prompt_logprobs": 3,
    "stop_token_ids": (6,),
    "ignore_eos": True,
    "min_tokens": 4,
    "grammar": Grammar("regex", "[0-9]+"),
}


def resolve(
    request: GenerationRequest, *, max_tokens: int = 9, info: EngineInfo = INFO, defaults: SamplingDefaults = DEFAULTS
) -> GenerationRequest:
    return resolve_params(request, info, defaults, max_tokens=max_tokens)


def resolved(max_tokens: int = 9, **given: Any) -> SamplingParams:
    return resolve(complete("x", **given), max_tokens=max_tokens).sampling


@pytest.mark.parametrize("use_recommended", [True, False])
def test_every_parameter_that_is_given_reaches_the_engine(use_recommended: bool):
    """Under the same name, whatever the model recommends; which of several samples it is, the service says later."""
    request = complete("x", use_recommended=use_recommended, **GIVEN)

    assert {each.name for each in fields(SamplingParams)} - {"sample"} == set(GIVEN)
    assert SamplingParams(**GIVEN) == resolve(request).sampling


def test_what_is_unset_is_the_service_s_own_and_otherwise_neutral():
    """Its temperature, and what fits behind the prompt; the model's recommendations are for those who want them."""
    request = resolve(complete("x"))

    assert SamplingParams(max_tokens=9, temperature=0.7) == request.sampling
    assert frozenset() == request.unset


def test_what_is_unset_is_the_model_s_recommendation_where_the_request_wants_it():
    """Top-k comes as a number with a fraction and is none."""
    request = resolve(complete("x", use_recommended=True))

    assert SamplingParams(max_tokens=9, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1) == (
        request.sampling
    )


@pytest.mark.parametrize(
    ("recommended", "openai_temperature", "temperature"),
    [((), None, 1.0), ((("temperature", 0.6),), None, 0.6), ((("temperature", 0.6),), 0.3, 0.3), ((), 0.3, 0.3)],
)
def test_the_temperature_is_the_configured_one_before_the_recommended_one_before_openai_s(
    recommended: tuple[tuple[str, float], ...], openai_temperature: float | None, temperature: float
):
    """Only where the request wants recommended values: the service's own default is another."""
    info, defaults = replace(INFO, recommended=recommended), replace(DEFAULTS, openai_temperature=openai_temperature)

    wanting, other = [
        resolve(complete("x", use_recommended=wants), info=info, defaults=defaults) for wants in (True, False)
    ]

    assert (temperature, 0.7) == (wanting.sampling.temperature, other.sampling.temperature)


def test_a_recommendation_that_the_engine_cannot_honour_is_left_out():
    """The request did not set it, so it is no reason to refuse the request."""
    info = replace(INFO, capabilities=Capabilities(unsupported=("min_p", "top_k")))

    sampling = resolve(complete("x", use_recommended=True), info=info).sampling

    assert (0.0, 0, 0.95) == (sampling.min_p, sampling.top_k, sampling.top_p)


@pytest.mark.parametrize(("given", "expected"), [({}, 4), ({"min_tokens": 0}, 0), ({"min_tokens": 6}, 6)])
def test_a_recommended_least_length_is_a_default(given: dict[str, Any], expected: int):
    """Only where the request wants recommended values, and never more than may be generated."""
    info = replace(INFO, recommended=(("min_tokens", 4.0),))

    def least(request: GenerationRequest, **limits: int) -> int:
        return resolve(request, info=info, **limits).sampling.min_tokens  # type: ignore[arg-type]  # only max_tokens

    assert expected == least(complete("x", use_recommended=True, **given))
    assert 2 == least(complete("x", use_recommended=True), max_tokens=2)
    assert 0 == least(complete("x"))


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_a_neutral_value_that_is_given_is_not_unset(name: str):
    """Zero is a temperature, and 1 a nucleus of everything, though a parameter that nobody set has the same value."""
    neutral = getattr(SamplingParams(), name)

    sampling = resolve(complete("x", use_recommended=True, **{name: neutral})).sampling

    assert neutral == getattr(sampling, name)
    assert neutral != getattr(resolve(complete("x", use_recommended=True)).sampling, name)


@pytest.mark.parametrize(("given", "temperature"), [(0.0, 0.0), (0.009, 0.0), (0.01, 0.01), (2.0, 2.0)])
def test_a_temperature_near_zero_is_zero(given: float, temperature: float):
    """Divided by it, logits would overflow; the most likely token wins either way."""
    assert temperature == resolved(temperature=given).temperature


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("logit_bias", {"logit_bias": ((0, 1.0), (1000, 1.0))}),
        ("stop_token_ids", {"stop_token_ids": (5, 1000)}),
        ("min_tokens", {"min_tokens": 10}),
    ],
)
def test_what_this_model_cannot_do_is_refused_by_name(name: str, given: dict[str, Any]):
    """A token that it does not have; more tokens at least than fit behind this prompt."""
    with pytest.raises(InvalidRequest) as refused:
        resolved(**given)

    assert [name] == [error["field"] for error in refused.value.details["errors"]]
    assert refused.value.message.startswith(name)


def test_the_limits_themselves_are_allowed():
    """The last token of the vocabulary, and as many tokens at least as at most."""
    sampling = resolved(logit_bias=((999, 1.0),), stop_token_ids=(999,), min_tokens=9)

    assert (((999, 1.0),), (999,), 9) == (sampling.logit_bias, sampling.stop_token_ids, sampling.min_tokens)


@pytest.mark.parametrize(
    ("fields", "cached"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.001}, True),
        ({"temperature": 0.8, "seed": 1}, True),
        ({"temperature": 0.8}, False),
        ({}, False),
        ({"temperature": 0.8, "cache_random": True}, True),
        ({"temperature": 0.0, "cache": False}, False),
    ],
    ids=str,
)
def test_a_random_sample_may_be_barred_from_the_cache(fields: dict[str, Any], cached: bool):
    """By `cache_random=False`: greedy and seeded ones are the same every time, and `cache=False` bars any."""
    request = resolve(complete("x", **{"cache_random": False} | fields))

    assert cached == request.cache


def test_a_default_decides_whether_a_sample_is_random():
    """What the request left open counts as it is filled in, not as it came."""
    request = complete("x", cache_random=False)

    assert not resolve(request, defaults=replace(DEFAULTS, temperature=0.8)).cache
    assert resolve(request, defaults=replace(DEFAULTS, temperature=0.0)).cache
    assert is_deterministic(resolve(request, defaults=replace(DEFAULTS, temperature=0.0)).sampling)
