"""The service in front of vLLM, both as processes: what a client asks for is what vLLM is asked, and what it answers.

Runs with `make test-vllm`, which installs vLLM and so needs the package indexes.
"""

import http.client
import json
import os
import signal
import time
from typing import Any

import httpx
import pytest

from bench.process import Server
from tests.e2e.conftest import Service
from tests.upstreams.conftest import Count
from tests.waiting import wait_for

pytestmark = [pytest.mark.upstreams, pytest.mark.timeout(1800)]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = "bako biko boku"
HI = [{"role": "user", "content": WORDS}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
FUNCTION = {"name": "look_up", "description": "A city.", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}


def running(count: Count) -> float:
    return count("vllm:num_requests_running{", "vllm:num_requests_waiting{")


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=GREEDY | body)
    assert 200 == reply.status_code, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def streamed(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = client.post(path, json=GREEDY | body | options).text.splitlines()
    assert "data: [DONE]" == [line for line in lines if line][-1]
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.fixture(scope="module")
def dense(before_vllm: Service) -> dict[str, Any]:
    """Fields that forbid blanks between the parts of JSON, which random weights would never end."""
    blanks = [before_vllm.client.post("/tokenize", json={"prompt": each}).json()["tokens"] for each in " \n\t\r"]
    return {"logit_bias": {str(each[0]): -100 for each in blanks}, "max_tokens": 150}


def test_what_vllm_is_shows_in_what_the_service_reports(before_vllm: Service):
    """Nothing was configured but its address, its key and the public name."""
    engine = before_vllm.engine()
    cards = before_vllm.get("/v1/models").json()["data"]

    assert ("ready", [True]) == (engine["state"], [each["ready"] for each in engine["upstreams"]])
    assert [("here", 512)] == [(card["id"], card["max_model_len"]) for card in cards]
    assert "top_k" not in before_vllm.get("/info").text.partition("unsupported")[2][:400]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": HI}),
        (CHAT, {"messages": [{"role": "system", "content": "boba"}, *HI]}),
        (TEXT, {"prompt": WORDS}),
        (TEXT, {"prompt": [300, 301, 302]}),
    ],
    ids=["chat", "system", "text", "tokens"],
)
def test_an_answer_is_vllm_s_own_with_its_usage(
    path: str, fields: dict[str, Any], before_vllm: Service, direct: httpx.Client
):
    through, own = post(before_vllm.client, path, **fields), post(direct, path, model="there", **fields)

    for each in (through["choices"][0], own["choices"][0]):
        each["text"] = each.get("text") or each["message"]["content"]
    assert own["choices"][0]["text"] == through["choices"][0]["text"]
    assert own["choices"][0]["finish_reason"] == through["choices"][0]["finish_reason"] == "length"
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert own["usage"][name] == through["usage"][name]


def test_a_stream_says_what_the_whole_answer_does_and_ends_with_the_usage(before_vllm: Service):
    whole = post(before_vllm.client, CHAT, messages=HI)
    chunks = streamed(before_vllm.client, CHAT, messages=HI)

    assert whole["choices"][0]["message"]["content"] == text_of(chunks)
    assert len(chunks) > 10
    assert 24 == chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert ["length"] == [
        each["finish_reason"] for chunk in chunks for each in chunk["choices"] if each["finish_reason"]
    ]


def test_a_stop_string_ends_the_answer_and_is_named(before_vllm: Service):
    """By vLLM itself, where nothing is filtered here."""
    whole = post(before_vllm.client, CHAT, messages=HI)["choices"][0]["message"]["content"]
    stop = whole.split()[5]

    cut = post(before_vllm.client, CHAT, messages=HI, stop=[stop])

    assert whole[: whole.index(stop)] == cut["choices"][0]["message"]["content"]
    assert ("stop", stop) == (cut["choices"][0]["finish_reason"], cut["choices"][0]["stop_reason"])
    assert cut["usage"]["completion_tokens"] < 24


def test_samples_differ_and_a_seed_repeats_all_of_them(before_vllm: Service):
    fields: dict[str, Any] = {"messages": HI, "n": 3, "temperature": 1.0, "seed": 7}
    first, second = [
        [each["message"]["content"] for each in post(before_vllm.client, CHAT, **fields)["choices"]] for _ in range(2)
    ]

    assert 3 == len(set(first))
    assert first == second


def test_log_probabilities_are_vllm_s_and_spell_the_text(before_vllm: Service, direct: httpx.Client):
    fields: dict[str, Any] = {"messages": HI, "logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    through, own = [
        post(client, CHAT, **fields, **name)["choices"][0]
        for client, name in ((before_vllm.client, {}), (direct, {"model": "there"}))
    ]

    scored = through["logprobs"]["content"]
    assert through["message"]["content"] == "".join(each["token"] for each in scored)
    assert [8, 3] == [len(scored), len(scored[0]["top_logprobs"])]
    for mine, its in zip(scored, own["logprobs"]["content"], strict=True):
        assert its["token"] == mine["token"]
        assert pytest.approx(its["logprob"], abs=0.01) == mine["logprob"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called(stream: bool, before_vllm: Service, dense: dict[str, Any]):
    fields: dict[str, Any] = {"messages": HI, "tools": [TOOL], "tool_choice": "required", **dense}
    if stream:
        chunks = streamed(before_vllm.client, CHAT, **fields)
        parts = [part for chunk in chunks for each in chunk["choices"] for part in each["delta"].get("tool_calls", [])]
        name = "".join(part["function"].get("name") or "" for part in parts if part["index"] == 0)
        arguments = "".join(part["function"].get("arguments") or "" for part in parts if part["index"] == 0)
    else:
        called = post(before_vllm.client, CHAT, **fields)["choices"][0]["message"]["tool_calls"][0]["function"]
        name, arguments = called["name"], called["arguments"]

    assert "look_up" == name
    assert json.loads(arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"structured_outputs": {"regex": '\\{"city": "(Paris|Rome)"\\}'}},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=["response_format", "regex", "json"],
)
def test_an_answer_has_the_form_that_was_asked_for(fields: dict[str, Any], before_vllm: Service, dense: dict[str, Any]):
    said = post(before_vllm.client, CHAT, messages=HI, **dense, **fields)["choices"][0]["message"]["content"]

    assert json.loads(said)["city"] in ("Paris", "Rome")


def test_prompts_are_counted_exactly_before_they_are_sent(before_vllm: Service):
    """By vLLM's own route, chats with its own template; nothing is said to be an estimate."""
    reply = before_vllm.client.post("/v1/chat", json=GREEDY | {"messages": HI, "session_id": "counted"}).json()
    text = before_vllm.client.post("/tokenize", json={"prompt": WORDS}).json()

    assert reply["usage"]["prompt_tokens"] == reply["context"]["prompt_tokens"]
    assert "estimated" not in reply["context"]
    assert text["count"] == len(text["tokens"])
    assert {"prompt": WORDS} == before_vllm.client.post("/detokenize", json={"tokens": text["tokens"]}).json()


def test_what_does_not_fit_is_refused_here(before_vllm: Service, count: Count):
    """With the words of this service; vLLM hears nothing of it."""
    before = count("vllm:prompt_tokens_total{")
    reply = before_vllm.client.post(CHAT, json=GREEDY | {"messages": [{"role": "user", "content": WORDS * 300}]})

    assert (400, "context_length_exceeded") == (reply.status_code, reply.json()["error"]["code"])
    assert before == count("vllm:prompt_tokens_total{")


def test_a_conversation_finds_its_beginning_in_vllm_s_cache(before_vllm: Service, count: Count):
    """The session's history is sent word by word as before."""
    body = GREEDY | {"session_id": "cached", "messages": [{"role": "user", "content": f"{WORDS} " * 60}]}
    assert 200 == before_vllm.client.post("/v1/chat", json=body).status_code
    before = count("vllm:prefix_cache_hits_total{")
    second = before_vllm.client.post("/v1/chat", json=body | {"messages": HI}).json()

    assert second["context"]["turns_kept"] == 1
    assert count("vllm:prefix_cache_hits_total{") - before >= 128


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_request_in_vllm_within_a_second(
    stream: bool, before_vllm: Service, count: Count
):
    """And most of what was asked for is never generated."""
    assert 0 == running(count)
    before = count("vllm:generation_tokens_total{")
    body = {"messages": HI, "max_tokens": 450, "ignore_eos": True, "stream": stream, "n": 4}
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(before_vllm.url).port or 0, timeout=60)
    connection.request(
        "POST", CHAT, json.dumps(body), {**before_vllm.client.headers, "content-type": "application/json"}
    )
    wait_for(lambda: running(count) == 4, 30)
    connection.close()
    hung_up = time.monotonic()
    wait_for(lambda: running(count) == 0, 30)

    assert time.monotonic() - hung_up < 1
    assert count("vllm:generation_tokens_total{") - before < 4 * 450


def test_vllm_s_faults_are_this_service_s_own_and_it_comes_back(before_vllm: Service, vllm: Server):
    """Suspended it is silent, which ends in an error and no wait for ever."""
    os.kill(vllm.pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            before_vllm.client.post(CHAT, json=GREEDY | {"messages": HI}, timeout=1)
    finally:
        os.kill(vllm.pid, signal.SIGCONT)

    wait_for(lambda: before_vllm.get("/readyz").status_code == 200, 30)
    assert 200 == before_vllm.client.post(CHAT, json=GREEDY | {"messages": HI}).status_code
    wait_for(lambda: before_vllm.engine()["upstreams"][0]["running"] == 0)
    log = before_vllm.log.read_text()
    assert "upstream-key-1234" not in log
