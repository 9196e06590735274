"""What a parameter is that a request of OpenAI's dialect leaves out, as the engine receives it."""

from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from app.engine.base import Capabilities
from app.types import SamplingParams
from tests.web.harness import CHAT, GENERATE, MODEL, RecordingEngine, make_web

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
BODIES = {CHATS: CHAT, TEXTS: GENERATE}
TYPES = {CHATS: chat_params.CompletionCreateParamsNonStreaming, TEXTS: text_params.CompletionCreateParamsNonStreaming}
RECOMMENDED = (("temperature", 0.6), ("top_k", 20.0), ("repetition_penalty", 1.05))


async def sampled(
    engine: RecordingEngine, *bodies: dict[str, Any], path: str = CHATS, **sections: Any
) -> list[SamplingParams]:
    """Send requests one after the other, and return the sampling parameters with which they reach the engine."""
    web = await make_web(engines={MODEL: engine}, **sections)
    async with web.client() as client:
        for fields in bodies:
            reply = await client.post(path, json={**BODIES[path], **fields})
            assert 200 == reply.status_code, reply.text
    return [request.sampling for request in engine.requests]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("value", [None, "left out"])
async def test_what_is_left_out_has_openais_defaults(path, value):
    """Temperature 1 and no filter, whatever holds on the native routes; a plain completion has 16 tokens."""
    nothing = dict.fromkeys(get_type_hints(TYPES[path]).keys() - BODIES[path].keys()) if value is None else {}

    (params,) = await sampled(RecordingEngine(), nothing, path=path, model={"temperature": 0.2, "max_tokens": 77})

    assert SamplingParams(temperature=1.0, max_tokens={CHATS: 77, TEXTS: 16}[path]) == params


async def test_native_routes_follow_the_configuration_and_no_recommendation():
    engine = RecordingEngine(recommended=RECOMMENDED)
    web = await make_web(engines={MODEL: engine}, model={"temperature": 0.2, "max_tokens": 77})
    async with web.client() as client:
        await client.post("/v1/generate", json=GENERATE)
        await client.post("/v1/chat", json={**CHAT, "temperature": 0.4})

    first, second = [request.sampling for request in engine.requests]
    assert SamplingParams(temperature=0.2, max_tokens=77) == first
    assert SamplingParams(temperature=0.4, max_tokens=77) == second


@pytest.mark.parametrize("path", BODIES)
async def test_what_the_models_files_recommend_goes_before_openais_defaults(path):
    (params,) = await sampled(RecordingEngine(recommended=RECOMMENDED), {"max_tokens": 5}, path=path)

    assert SamplingParams(temperature=0.6, top_k=20, repetition_penalty=1.05, max_tokens=5) == params
    assert isinstance(params.top_k, int)


async def test_a_length_and_no_sampling_are_recommendations_too():
    """A chat that names no max_tokens has the model's; a plain completion OpenAI's, a native route the service's."""
    engine = RecordingEngine(recommended=(("temperature", 0.0), ("max_tokens", 33)))
    web = await make_web(engines={MODEL: engine}, model={"temperature": 0.2, "max_tokens": 77})
    async with web.client() as client:
        for path, body in ((CHATS, CHAT), (CHATS, {**CHAT, "max_tokens": 5}), (TEXTS, BODIES[TEXTS])):
            await client.post(path, json=body)
        await client.post("/v1/generate", json=GENERATE)

    sampled_with = [(request.sampling.max_tokens, request.sampling.temperature) for request in engine.requests]
    assert [(33, 0.0), (5, 0.0), (16, 0.0), (77, 0.2)] == sampled_with


async def test_the_configuration_goes_before_both_and_a_request_before_all():
    named = {"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    for engine in (RecordingEngine(), RecordingEngine(recommended=RECOMMENDED)):
        left_out, given = await sampled(engine, {}, named, openai={"temperature": 0.3})
        assert (0.3, 1.0) == (left_out.temperature, given.temperature)
        assert (0, 1.0) == (given.top_k, given.repetition_penalty)


async def test_a_recommendation_that_the_engine_cannot_honour_is_left_out():
    """A request that never named the parameter would be refused; one that names it is, by its name."""
    unsupported = Capabilities(unsupported=("repetition_penalty",))
    engine = RecordingEngine(recommended=RECOMMENDED, capabilities=unsupported)
    (params,) = await sampled(engine, {})
    web = await make_web(engines={MODEL: engine})
    async with web.client() as client:
        refused = await client.post(CHATS, json={**CHAT, "repetition_penalty": 1.1})

    assert (0.6, 1.0) == (params.temperature, params.repetition_penalty)
    assert (400, "repetition_penalty") == (refused.status_code, refused.json()["error"]["param"])


@pytest.mark.parametrize(
    ("fields", "recommended", "verdict"),
    [
        ({"temperature": 0}, (), "MISS"),
        ({"temperature": 0.005}, (), "MISS"),
        ({"temperature": 1, "seed": 0}, (), "MISS"),
        ({}, (("temperature", 0.0),), "MISS"),
        ({"temperature": 0.01}, (), "BYPASS"),
        ({"temperature": 1}, (), "BYPASS"),
        ({}, (), "BYPASS"),
        ({}, (("temperature", 0.6),), "BYPASS"),
    ],
)
async def test_a_response_is_deterministic_without_chance_or_with_a_seed(fields, recommended, verdict):
    """Whatever decides the temperature; only such responses may come from the cache."""
    web = await make_web(engines={MODEL: RecordingEngine(recommended=recommended)})
    async with web.client() as client:
        reply = await client.post(CHATS, json={**CHAT, **fields})

    assert verdict == reply.headers["x-cache"]
