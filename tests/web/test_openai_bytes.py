"""What OpenAI's routes send, byte for byte, as the files in `golden/` show it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.engine.echo import EchoEngine
from app.errors import EngineFailed
from app.events import Delta, ToolCallDelta
from app.types import FinishReason, SamplingParams
from app.web.openai.stream_encoder import DONE
from tests.web.harness import CHAT, GENERATE, MODEL, LoadingEngine, RecordingEngine, ScriptedService, Step, make_web

GOLDEN = Path(__file__).with_name("golden")
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
USAGE = {"stream_options": {"include_usage": True}}
ALWAYS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SCORED = {CHATS: {"logprobs": True, "top_logprobs": 1}, TEXTS: {"logprobs": 1}}

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHATS, {}),
    "chat_scored": (CHATS, {"n": 2, **SCORED[CHATS]}),
    "text": (TEXTS, {}),
    "text_scored": (TEXTS, {"n": 2, **SCORED[TEXTS]}),
    "text_echo": (TEXTS, {"prompt": ["one", "two"], "echo": True}),
}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat_stream": (CHATS, {}),
    "chat_stream_usage": (CHATS, {"n": 2, **USAGE}),
    "chat_stream_usage_always": (CHATS, ALWAYS),
    "chat_stream_scored": (CHATS, SCORED[CHATS]),
    "text_stream": (TEXTS, {}),
    "text_stream_usage": (TEXTS, {"n": 2, **USAGE}),
    "text_stream_usage_always": (TEXTS, {"n": 2, "echo": True, **ALWAYS}),
    "text_stream_scored": (TEXTS, SCORED[TEXTS]),
    "text_stream_echo": (TEXTS, {"echo": True}),
}

TOOLS = {"tools": [{"type": "function", "function": {"name": "add"}}]}
FUNCTIONS = {"functions": [{"name": "add"}]}
CALLING: dict[str, dict[str, Any]] = {
    "chat_tools": TOOLS,
    "chat_functions": FUNCTIONS,
    "chat_tools_stream": {"n": 2, "stream": True, **TOOLS},
    "chat_functions_stream": {"stream": True, **FUNCTIONS},
}
"""Chats whose completions call."""


def body(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {**(CHAT if path == CHATS else GENERATE), **fields}


def steady(text: str) -> str:
    """Put the same words wherever an answer has an id, a time or a fingerprint of its own."""
    text = re.sub(r'"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"\1-ID"', text)
    text = re.sub(r'"created":1[0-9]{9}\b', '"created":TIME', text)
    return re.sub(r'"fp_[0-9a-f]{10}"', '"fp_PRINT"', text)


@pytest.mark.parametrize("name", WHOLE)
async def test_a_whole_answer_is_as_its_file_shows(client, name):
    path, fields = WHOLE[name]

    reply = await client.post(path, json=body(path, fields))

    assert (GOLDEN / f"{name}.json").read_text() == steady(reply.text) + "\n"


@pytest.mark.parametrize("name", STREAMS)
async def test_a_stream_is_as_its_file_shows(client, name):
    path, fields = STREAMS[name]

    reply = await client.post(path, json=body(path, {**fields, "stream": True}))

    assert "text/event-stream; charset=utf-8" == reply.headers["content-type"]
    assert ("no-store", "no") == (reply.headers["cache-control"], reply.headers["x-accel-buffering"])
    assert (GOLDEN / f"{name}.txt").read_text() == steady(reply.text)


@pytest.mark.parametrize(("path", "name"), [(CHATS, "chat_stream_error"), (TEXTS, "text_stream_error")])
async def test_an_error_inside_a_stream_is_an_object_and_then_done(path, name):
    web = await make_web(ScriptedService(steps=["Hel", EngineFailed('The "engine" died.')]))
    async with web.client() as client:
        reply = await client.post(path, json=body(path, {"stream": True, **USAGE}))

    assert 200 == reply.status_code
    assert (GOLDEN / f"{name}.txt").read_text() == steady(reply.text)


@pytest.mark.parametrize("name", CALLING)
async def test_thoughts_and_calls_are_as_their_file_shows(name):
    """Reasoning under both its names, calls in parts with their index, and in the older form where that was asked."""
    steps: list[Step] = [
        Delta(reasoning="Let me", tokens=1),
        Delta(reasoning=" add.", tool_calls=(ToolCallDelta(id="call_1", name="add"),), tokens=1),
        Delta(tool_calls=(ToolCallDelta(arguments='{"a": 1}'),), tokens=1),
    ]
    if "tools" in name:
        second = (ToolCallDelta(position=1, id="call_2", name="add", arguments="{}"),)
        steps += [Delta(text="So:", tool_calls=second, tokens=1)] if "stream" in name else [Delta(tool_calls=second)]
    web = await make_web(ScriptedService(steps, finish_reason=FinishReason.TOOL_CALLS, reasoning_tokens=2))
    async with web.client() as client:
        reply = await client.post(CHATS, json=body(CHATS, CALLING[name]))

    file = GOLDEN / f"{name}.{'txt' if 'stream' in name else 'json'}"
    assert file.read_text() == steady(reply.text) + "\n" * (file.suffix == ".json")


async def test_no_golden_file_is_left_over():
    names = {f"{name}.json" for name in WHOLE} | {f"{name}.txt" for name in STREAMS}
    names |= {f"{name}.{'txt' if 'stream' in name else 'json'}" for name in CALLING}
    assert names | {"chat_stream_error.txt", "text_stream_error.txt"} == {file.name for file in GOLDEN.iterdir()}


@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_an_answer_that_the_service_cut_short_is_an_error(path):
    """No finish reason says that; whole it is a 503 that clients try again, in a stream the error object."""
    web = await make_web(ScriptedService(finish_reason=FinishReason.ABORT))
    async with web.client() as client:
        whole = await client.post(path, json=body(path, {}))
        streamed = await client.post(path, json=body(path, {"stream": True}))

    assert (503, "service_unavailable") == (whole.status_code, whole.json()["error"]["code"])
    assert int(whole.headers["retry-after"]) >= 1
    *_, error, done, _ = streamed.text.split("\n\n")
    assert "service_unavailable" == json.loads(error.removeprefix("data: "))["error"]["code"]
    assert DONE.decode() == f"{done}\n\n"
    assert '"finish_reason":"' not in streamed.text


async def test_every_answer_has_an_id_of_its_own_and_the_models_fingerprint(client):
    first, second = [(await client.post(CHATS, json=CHAT)).json() for _ in range(2)]

    assert first["id"] != second["id"]
    assert first["id"].startswith("chatcmpl-")
    assert first["system_fingerprint"] == second["system_fingerprint"]
    assert abs(first["created"] - (await client.get("/v1/models")).json()["data"][0]["created"]) < 60


async def test_models_are_listed_with_the_fields_of_both_servers(client):
    listed = (await client.get("/v1/models")).json()
    one = await client.get(f"/v1/models/{MODEL}")
    missing = await client.get("/v1/models/gpt-4o")

    assert ("list", [one.json()]) == (listed["object"], listed["data"])
    assert isinstance(one.json().pop("created"), int)
    assert {
        "id": MODEL,
        "object": "model",
        "owned_by": "llm-service",
        "root": MODEL,
        "parent": None,
        "max_model_len": 8192,
        "quantization": None,
        "permission": [],
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "status": {"value": "loaded", "failed": False},
    } == {name: value for name, value in one.json().items() if name != "created"}
    assert (404, "model_not_found", "model") == (
        missing.status_code,
        missing.json()["error"]["code"],
        missing.json()["error"]["param"],
    )


async def test_a_quantized_model_says_what_that_costs():
    """Its log-probabilities differ from the unquantized model's, and the card says by how much."""
    web = await make_web(engines={MODEL: RecordingEngine(logprob_shift=0.0583)})
    async with web.client() as client:
        card = (await client.get(f"/v1/models/{MODEL}")).json()

    assert {"method": "int8", "logprob_shift": 0.0583} == card["quantization"]


async def test_a_model_of_the_hub_has_a_slash_in_its_name():
    name = "google/gemma-2-2b-it"
    web = await make_web(engines={name: EchoEngine(model=name)})
    async with web.client() as client:
        assert name == (await client.get(f"/v1/models/{name}")).json()["id"]


async def test_a_model_that_still_loads_is_listed_and_its_requests_have_to_wait():
    """Only its name is known yet."""
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL), "slow": LoadingEngine(model="slow")})
    async with web.client() as client:
        card = (await client.get("/v1/models/slow")).json()
        reply = await client.post(CHATS, json=body(CHATS, {"model": "slow"}))

    assert ({"value": "loading", "failed": False}, None) == (card["status"], card["max_model_len"])
    assert (503, "service_unavailable") == (reply.status_code, reply.json()["error"]["code"])
    assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("fields", "headers", "verdict"),
    [
        ({"temperature": 0}, {}, "MISS"),
        ({"seed": 1}, {}, "MISS"),
        ({}, {}, "BYPASS"),
        ({"temperature": 0.7}, {}, "BYPASS"),
        ({"temperature": 0}, {"Cache-Control": "no-cache"}, "BYPASS"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHATS, TEXTS])
async def test_only_what_is_deterministic_may_come_from_the_cache(path, fields, headers, verdict, stream):
    """The first request stores its response only where the second may take it."""
    engine = RecordingEngine()
    web = await make_web(engines={MODEL: engine})
    async with web.client() as client:
        replies = [
            await client.post(path, json=body(path, {**fields, "stream": stream}), headers=headers) for _ in range(2)
        ]

    second = "BYPASS" if verdict == "BYPASS" else "HIT"
    assert [verdict, second] == [reply.headers["x-cache"] for reply in replies]
    assert (1 if second == "HIT" else 2) == len(engine.requests)
    assert steady(replies[0].text) == steady(replies[1].text)


@pytest.mark.parametrize("stream", [True, False])
async def test_without_a_cache_every_response_is_a_bypass(stream):
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, cache={"enabled": False})
    async with web.client() as client:
        reply = await client.post(CHATS, json={**CHAT, "temperature": 0, "stream": stream})

    assert "BYPASS" == reply.headers["x-cache"]


@pytest.mark.parametrize(
    ("fields", "headers", "session"),
    [
        ({}, {}, None),
        ({"session_id": "s"}, {}, "s"),
        ({}, {"X-Session-ID": "h"}, "h"),
        ({"session_id": "s"}, {"X-Session-ID": "s"}, "s"),
        ({"user": "u", "metadata": {"session_id": "m"}}, {"X-OpenWebUI-Chat-Id": "c"}, None),
    ],
)
async def test_a_session_is_continued_only_where_one_is_named(web, client, fields, headers, session):
    await client.post(CHATS, json={**CHAT, **fields}, headers=headers)

    assert session == web.service.requests[0].session_id


@pytest.mark.parametrize(
    ("headers", "param"), [({"X-Session-ID": "other"}, "session_id"), ({"X-Session-ID": "a b"}, "X-Session-ID")]
)
async def test_a_session_that_is_not_clear_is_refused(web, client, headers, param):
    reply = await client.post(CHATS, json={**CHAT, "session_id": "s"}, headers=headers)

    assert (400, param) == (reply.status_code, reply.json()["error"]["param"])
    assert [] == web.service.requests


async def test_the_last_message_is_continued_on_request(web, client):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "The answer is"}]
    for fields, continued in (({}, False), ({"continue_final_message": True, "add_generation_prompt": False}, True)):
        assert 200 == (await client.post(CHATS, json={"messages": messages, **fields})).status_code
        assert continued == web.service.requests[-1].continue_final_message


async def test_nothing_of_the_sampling_is_lost_in_translation(web, client):
    await client.post(CHATS, json={**CHAT, "logprobs": True, "top_logprobs": 4, "n": 2, "top_k": 5, "seed": 3})

    (request,) = web.service.requests
    assert (SamplingParams(logprobs=4, top_k=5, seed=3), 2) == (request.sampling, request.n)
    assert {"max_tokens", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty"} == request.unset
