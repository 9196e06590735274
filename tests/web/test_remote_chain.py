"""A chain of two services behaves as one: the model stands behind the second, everything else in front of it too."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.config import DeadlineConfig, ModelConfig
from app.config.remote import RemoteConfig
from app.engine.local import LocalEngine
from app.engine.remote.engine import RemoteEngine
from tests.waiting import until
from tests.web.harness import KEY, Web, frames, make_web

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "tiny-chat"
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/v1/chat"
HI = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ABOUT_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
RESULT = [
    *ABOUT_WEATHER,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and sunny"},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
GREEDY = {"temperature": 0, "max_tokens": 40}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": HI}),
    "system": (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, *HI]}),
    "seed": (
        CHAT,
        {"messages": HI, "temperature": 1, "seed": 7, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    ),
    "logprobs": (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 3}),
    "length": (CHAT, {"messages": HI, "max_tokens": 3}),
    "tools": (CHAT, {"messages": ABOUT_WEATHER, "tools": [WEATHER]}),
    "required": (CHAT, {"messages": HI, "tools": [WEATHER], "tool_choice": "required"}),
    "result": (CHAT, {"messages": RESULT, "tools": [WEATHER]}),
    "schema": (CHAT, {"messages": HI, "response_format": FORMAT}),
    "regex": (CHAT, {"messages": HI, "structured_outputs": {"regex": "[a-z]{5}"}}),
    "continued": (
        CHAT,
        {
            "messages": [*HI, {"role": "assistant", "content": "The capital"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    "samples": (CHAT, {"messages": HI, "n": 2}),
    "text": (TEXT, {"prompt": "Once upon a time"}),
    "echo": (TEXT, {"prompt": "Once upon a time", "echo": True}),
    "tokens": (TEXT, {"prompt": [[40, 41, 42]]}),
    "text logprobs": (TEXT, {"prompt": "Once", "logprobs": 2}),
    "several": (TEXT, {"prompt": ["Once", "There was"]}),
    "masked": (CHAT, {"messages": [{"role": "user", "content": "Repeat: mail me at ann@example.com"}]}),
    "native": (NATIVE, {"messages": HI}),
    "native text": ("/v1/generate", {"prompt": "Once upon a time"}),
    "response": ("/v1/responses", {"input": "What is the capital of France?", "max_output_tokens": 40}),
}
OF_THEIR_OWN = frozenset(
    [
        *("id", "created", "created_at", "completed_at", "system_fingerprint", "request_id", "item_id", "call_id"),
        *("cached_tokens", "obfuscation"),
    ]
)
"""Fields in which two answers always differ, or that say what a cache had."""


@dataclass
class Chain:
    """Two services, of which the first stands in front of the second."""

    front: Web
    back: Web


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain() -> AsyncIterator[Chain]:
    # One way of computing, and sums that are the same to the last digits that matter, whatever runs beside them.
    config = ModelConfig(name=str(Path("models") / NAME), compile="none", dtype="float32")
    model = LocalEngine(config, DeadlineConfig())
    sections: dict[str, Any] = {"rate_limit": {"enabled": False}, "cache": {"enabled": False}}
    async with AsyncExitStack() as stack:
        back = await make_web(engines={NAME: model}, **sections)
        stack.push_async_callback(model.close)
        await model.wait_ready()
        port = await stack.enter_async_context(back.listening())
        upstream = RemoteConfig.model_validate({"base_urls": [f"http://127.0.0.1:{port}/v1"], "api_key": KEY})
        remote = RemoteEngine(upstream, DeadlineConfig(), name=NAME)
        front = await make_web(engines={NAME: remote}, **sections)
        stack.push_async_callback(remote.close)
        await remote.wait_ready()
        yield Chain(front, back)


def comparable(value: Any) -> Any:
    """Return an answer without what is different each time."""
    if isinstance(value, dict):
        call = value.get("type") == "function"
        return {
            name: "" if name in OF_THEIR_OWN or (call and name == "id") else comparable(each)
            for name, each in value.items()
        }
    return [comparable(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS)
async def test_an_answer_through_two_services_is_that_of_one(chain: Chain, path: str, body: dict[str, Any]):
    """Text, calls, log-probabilities, how it ended and what it cost."""
    limits = {"temperature": 0} if path == "/v1/responses" else GREEDY
    replies = []
    for web in (chain.front, chain.back):
        async with web.client() as client:
            replies.append(await client.post(path, json=limits | body))

    through, direct = replies
    assert 200 == direct.status_code, direct.text
    assert 200 == through.status_code, through.text
    assert comparable(direct.json()) == comparable(through.json())


@pytest.mark.parametrize("name", ["chat", "tools", "logprobs", "text", "schema"])
async def test_a_stream_through_two_services_says_what_that_of_one_does(chain: Chain, name: str):
    path, body = REQUESTS[name]
    said = []
    for web in (chain.front, chain.back):
        async with web.client() as client:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            lines = (await client.post(path, json=GREEDY | body | options)).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        deltas = [choice.get("delta", {}) for choice in choices]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
        said.append(
            [
                "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices),
                ("".join(call.get("name") or "" for call in calls), "".join(call["arguments"] for call in calls)),
                [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
                comparable([chunk["usage"] for chunk in chunks if chunk.get("usage")]),
            ]
        )

    assert said[1] == said[0]
    assert said[0][3]


async def test_a_stop_string_ends_the_answer_of_the_model_behind_both(chain: Chain):
    """Whoever filters answers looks for it, and hangs up; a few more tokens may have been generated by then."""
    answers = []
    for web in (chain.front, chain.back):
        async with web.client() as client:
            answers.append((await client.post(CHAT, json={**GREEDY, "messages": HI, "stop": ["a"]})).json())

    through, direct = [each["choices"][0] for each in answers]
    assert direct == through
    assert ("stop", "a") == (through["finish_reason"], through["stop_reason"])
    assert answers[1]["usage"]["completion_tokens"] <= answers[0]["usage"]["completion_tokens"] <= 40


async def test_a_session_lives_in_front_and_is_counted_exactly(chain: Chain):
    """The service behind has no such session; its history is part of the prompt, by the tokenizer of the model."""
    async with chain.front.client() as client:
        first, second = [
            (await client.post(NATIVE, json={**GREEDY, "session_id": "s1", "messages": [message]})).json()
            for message in (HI[0], {"role": "user", "content": "And of Spain?"})
        ]
        stored = (await client.get("/v1/sessions/s1")).json()
    async with chain.back.client() as client:
        whole = [HI[0], first["message"], {"role": "user", "content": "And of Spain?"}]
        direct = (await client.post(NATIVE, json={**GREEDY, "messages": whole})).json()
        unknown = await client.get("/v1/sessions/s1")

    assert 4 == len(stored["messages"])
    assert 404 == unknown.status_code
    assert (direct["message"], direct["usage"]["prompt_tokens"]) == (
        second["message"],
        second["usage"]["prompt_tokens"],
    )
    assert (1, second["usage"]["prompt_tokens"]) == (
        second["context"]["turns_kept"],
        second["context"]["prompt_tokens"],
    )
    assert "estimated" not in second["context"]


async def test_what_the_model_lacks_is_refused_by_its_name_in_the_client_s_words(chain: Chain):
    """Whether the first service knows it or the second."""
    refused = [
        {"messages": HI, "prompt_logprobs": 1},
        {"messages": HI, "chat_template_kwargs": {"speed": 1}},
        {"messages": HI, "structured_outputs": {"grammar": "start: ("}},
        {"messages": HI, "max_tokens": 100_000},
    ]
    fields = []
    async with chain.front.client() as client:
        for body in refused:
            reply = await client.post(CHAT, json=body)
            assert 400 == reply.status_code, reply.text
            fields.append(reply.json()["error"]["param"])

    assert ["prompt_logprobs", "chat_template_kwargs.speed", "structured_outputs.grammar", "messages"] == fields


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_frees_the_model_behind_both_services(chain: Chain, stream: bool):
    """Long before its answer would have ended, streaming or not."""
    body = {"messages": HI, "max_tokens": 400, "ignore_eos": True, "stream": stream}

    def running() -> int:
        return chain.back.host.default.engine.status().running

    async with chain.front.listening() as port:
        payload = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-api-key: {KEY}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        await until(lambda: running() == 1)
        writer.close()
        await until(lambda: running() == 0)


async def test_native_frames_come_through(chain: Chain):
    async with chain.front.client() as client:
        reply = await client.post(NATIVE, json={**GREEDY, "messages": HI, "stream": True})

    events = [name for name, _ in frames(reply.text)]
    assert ("delta", "done") == (events[0], events[-1])
    assert 1 == events.count("done")
