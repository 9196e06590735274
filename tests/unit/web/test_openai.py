"""What the OpenAI dialect decides without a request: defaults, fingerprints, text offsets of tokens."""

import json
from dataclasses import replace

import pytest
from app.engine.tokenizer.logprob_text import AnswerToken
from app.generation.requests import Sampling

from app.config import load_settings
from app.engine.base import EngineInfo
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.web.http.json_encoding import encode_json
from app.web.openai.request_model import OpenAIFields, ResolvedModel, is_deterministic
from app.web.openai.response_objects import TextLogprobs, fingerprint

INFO = EngineInfo(
    model="m",
    revision=None,
    engine="batching",
    device="cpu",
    dtype="float32",
    context_length=99,
    vocab_size=9,
    parameters=1,
)


class PartialContainer:
    """The part of a `Container` that `ResolvedModel` reads."""

    def __init__(self, info: EngineInfo, temperature: float | None = None) -> None:
        engine = EchoEngine()
        engine._info = info
        self.engines = EngineRegistry({"m": engine})
        self.settings = load_settings("absent.yml", None, openai={"temperature": temperature})


def sampling(info: EngineInfo, *, configured: float | None = None, **fields: float) -> Sampling:
    resolved = ResolvedModel.of(PartialContainer(info, configured), "m")
    return OpenAIFields(**fields).sampling(resolved, max_tokens=None, logprobs=None)


RECOMMENDED = replace(INFO, recommended=(("temperature", 0.6), ("top_k", 20.0), ("repetition_penalty", 1.05)))


def test_what_the_models_files_recommend_goes_before_openais_defaults():
    drawn = sampling(RECOMMENDED)

    assert (0.6, 20, 1.05, 1.0) == (drawn.temperature, drawn.top_k, drawn.repetition_penalty, drawn.top_p)
    assert isinstance(drawn.top_k, int)


def test_the_configuration_goes_before_both_and_a_request_before_all():
    assert 0.3 == sampling(RECOMMENDED, configured=0.3).temperature
    requested = sampling(RECOMMENDED, configured=0.3, temperature=1.0, top_k=0, repetition_penalty=1.0)
    assert (1.0, 0, 1.0) == (requested.temperature, requested.top_k, requested.repetition_penalty)


def test_a_recommendation_that_the_runner_cannot_honour_is_left_out():
    """A request that never named the parameter would be refused."""
    assert 1.0 == sampling(replace(RECOMMENDED, unsupported=("repetition_penalty",))).repetition_penalty


@pytest.mark.parametrize(
    ("drawn", "same"),
    [
        (Sampling(temperature=0), True),
        (Sampling(temperature=0.005), True),
        (Sampling(temperature=1, seed=0), True),
        (Sampling(temperature=0.01), False),
        (Sampling(temperature=1), False),
    ],
)
def test_an_answer_is_deterministic_without_chance_or_with_a_seed(drawn, same):
    assert same == is_deterministic(drawn)


def test_another_model_or_another_machine_has_another_fingerprint():
    others = [replace(INFO, revision="abc"), replace(INFO, dtype="bfloat16"), replace(INFO, device="cuda")]

    assert 4 == len({fingerprint(each) for each in (INFO, *others)})
    assert fingerprint(INFO) == fingerprint(replace(INFO))


def test_offsets_are_places_in_the_text_also_where_a_character_has_several_tokens():
    """A character counts with the token that completes it; each delta continues where the one before ended."""
    parts = [b"a", "\u20ac".encode()[:1], "\u20ac".encode()[1:], b"bc", b"d"]
    tokens = [AnswerToken(part.decode(errors="replace"), part, -1.0) for part in parts]
    logprobs = TextLogprobs()

    assert [0, 1, 1] == logprobs.next_object(tokens[:3])["text_offset"]
    assert [2, 4] == logprobs.next_object(tokens[3:])["text_offset"]


def test_the_token_itself_is_always_among_the_likely_ones():
    token = AnswerToken("x", b"x", -3.0, (AnswerToken("y", b"y", -0.1),))

    encoded = json.loads(encode_json(TextLogprobs().next_object([token])))

    assert [{"y": -0.1, "x": -3.0}] == encoded["top_logprobs"]
