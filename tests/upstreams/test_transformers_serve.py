"""The service in front of `transformers serve` with the embedded model: what it answers, and what it would ignore.

Runs with `make test-vllm`.
"""

import json
import time
from typing import Any

import httpx
import pytest

from bench.process import Server
from tests.e2e.conftest import Service
from tests.upstreams.conftest import TINY
from tests.waiting import wait_for

pytestmark = [pytest.mark.upstreams, pytest.mark.timeout(1800)]

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 30}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def test_an_answer_and_its_usage_are_its_own(before_transformers: Service, transformers: Server):
    """The prompt is counted exactly, by the model's tokenizer here."""
    answer = before_transformers.client.post("/v1/chat", json=GREEDY | {"messages": HI}).json()
    body = GREEDY | {"messages": HI, "model": str(TINY)}
    direct = httpx.post(f"http://127.0.0.1:{transformers.port}{CHAT}", json=body, timeout=120).json()

    assert direct["choices"][0]["message"]["content"] == answer["message"]["content"]
    assert direct["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert direct["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] == answer["context"]["prompt_tokens"]


def test_a_stream_says_what_the_whole_answer_does(before_transformers: Service):
    body = GREEDY | {"messages": HI}
    whole = before_transformers.client.post(CHAT, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = before_transformers.client.post(CHAT, json=body | options).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    said = "".join(each["delta"].get("content") or "" for chunk in chunks for each in chunk["choices"])
    assert whole["choices"][0]["message"]["content"] == said
    assert whole["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] > 1
    assert "data: [DONE]" == [line for line in lines if line][-1]


def test_a_stop_string_and_a_limit_end_the_answer(before_transformers: Service):
    whole = before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI}).json()["choices"][0]
    stop = whole["message"]["content"].split()[1]
    cut = before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI, "stop": [stop]}).json()["choices"][0]
    short = before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI, "max_tokens": 2}).json()

    assert stop not in cut["message"]["content"]
    assert ("stop", stop) == (cut["finish_reason"], cut["stop_reason"])
    assert ("length", 2) == (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"])


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("logprobs", {"logprobs": True}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
        ("presence_penalty", {"presence_penalty": 1}),
        ("top_k", {"top_k": 5}),
    ],
)
def test_what_it_would_ignore_is_refused_by_name(field: str, fields: dict[str, Any], before_transformers: Service):
    reply = before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI} | fields)

    assert (400, field) == (reply.status_code, reply.json()["error"]["param"]), reply.text


def test_a_client_that_hangs_up_frees_it_for_the_next(before_transformers: Service):
    """It serves one request at a time: the next one's answer would come after that of one that goes on."""
    quick = time.monotonic()
    assert 200 == before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI}).status_code
    quick = time.monotonic() - quick
    long = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 1900, "stream": True}
    with (
        httpx.Client(base_url=before_transformers.url, headers=before_transformers.client.headers) as client,
        client.stream("POST", CHAT, json=long, timeout=60) as reply,
    ):
        next(reply.iter_raw())
    wait_for(lambda: before_transformers.engine()["upstreams"][0]["running"] == 0, 1)
    began = time.monotonic()

    assert 200 == before_transformers.client.post(CHAT, json=GREEDY | {"messages": HI}).status_code
    assert time.monotonic() - began < quick + 2
