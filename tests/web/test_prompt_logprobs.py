"""Log-probabilities of prompts on OpenAI's routes: their shapes, what they cost, and what is withheld of them."""

import json
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.web.http import json_encoding
from tests.web.access import Running, running

TEXTS, CHATS = "/v1/completions", "/v1/chat/completions"
SSN = "856-45-6789"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as service:
        yield service


async def post(service: Running, path: str = TEXTS, **body: Any) -> dict[str, Any]:
    async with service.client() as http:
        reply = await http.post(path, json=body)
    assert 200 == reply.status_code, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def test_an_echoed_prompt_has_its_tokens_before_those_of_the_completion(service: Running):
    """In OpenAI's own object: the first has no log-probability, and every token stands where it says."""
    answer = await post(service, prompt="abc", max_tokens=2, echo=True, logprobs=1)

    (choice,) = answer["choices"]
    assert "abcab" == choice["text"]
    assert {
        "text_offset": [0, 1, 2, 3, 4],
        "token_logprobs": [None, 0.0, 0.0, 0.0, 0.0],
        "tokens": list("abcab"),
        "top_logprobs": [None, {"b": 0.0}, {"c": 0.0}, {"a": 0.0}, {"b": 0.0}],
    } == choice["logprobs"]
    assert "prompt_logprobs" not in choice


async def test_a_stream_says_the_same(service: Running):
    """The prompt first, its tokens behind it; joined, it is the whole answer."""
    body: dict[str, Any] = {"prompt": "abc" * 20, "max_tokens": 2, "echo": True, "logprobs": 0, "n": 2}
    whole = await post(service, **body)
    async with service.client() as http:
        reply = await http.post(TEXTS, json={**body, "stream": True})
    texts = ["", ""]
    joined: list[dict[str, list[Any]]] = [{name: [] for name in whole["choices"][0]["logprobs"]} for _ in range(2)]
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                joined[choice["index"]][name] += values

    assert [choice["text"] for choice in whole["choices"]] == texts
    assert [choice["logprobs"] for choice in whole["choices"]] == joined


async def test_several_prompts_are_scored_in_one_request(service: Running):
    """Texts and samples each at their own place, and token ids as they were sent."""
    answer = await post(service, prompt=["ab", "xyz"], n=2, max_tokens=0, echo=True, logprobs=0)
    assert ["ab", "ab", "xyz", "xyz"] == [each["text"] for each in answer["choices"]]
    assert [list(each["text"]) for each in answer["choices"]] == [
        each["logprobs"]["tokens"] for each in answer["choices"]
    ]
    answer = await post(service, prompt=[[97, 98], [120]], max_tokens=0, prompt_logprobs=0)
    assert [[None, {"98": {"logprob": 0.0, "rank": 1, "decoded_token": "b"}}], [None]] == [
        each["prompt_logprobs"] for each in answer["choices"]
    ]


async def test_a_chat_is_scored_whole(service: Running):
    """At the level of the response, as in vLLM, each token that the template made of it."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    answer = await post(service, CHATS, messages=messages, max_tokens=0, prompt_logprobs=1, logprobs=True)

    first, *others = answer["prompt_logprobs"]
    assert first is None
    assert ["s", "", "h", "i", ""] == [entry["decoded_token"] for each in others for entry in each.values()]
    assert ([], "") == (answer["choices"][0]["logprobs"]["content"], answer["choices"][0]["message"]["content"])


async def test_the_service_s_own_system_message_is_withheld(tmp_path: Path):
    """The caller's words behind it are scored, those of an earlier turn too."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
    ]
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "base_system.txt").write_text("You are a helpful assistant.")
    async with running(tmp_path, app={"prompts_dir": prompts}) as service:
        answer = await post(service, CHATS, messages=messages, max_tokens=0, prompt_logprobs=1)

    positions = answer["prompt_logprobs"]
    assert answer["usage"]["prompt_tokens"] == len(positions) > 20
    assert [None] * (len(positions) - 10) == positions[:-10]
    shown = [entry["decoded_token"] for each in positions[-10:] for entry in each.values()]
    assert ["", "h", "i", "", "y", "o", "", "s", "o", ""] == shown


async def test_the_two_shapes_have_each_their_alternatives(service: Running):
    """As many as each asks for, though the model is asked once."""
    answer = await post(service, prompt="abc", max_tokens=1, echo=True, logprobs=0, prompt_logprobs=1)
    (choice,) = answer["choices"]
    assert ["98", "99"] == [key for each in choice["prompt_logprobs"][1:] for key in each]
    assert [None, {"b": 0.0}, {"c": 0.0}, {"a": 0.0}] == choice["logprobs"]["top_logprobs"]


async def test_a_prompt_that_is_only_read_is_paid_for(tmp_path: Path):
    """Where it was computed, for its log-probabilities or for nothing but its echo; half where it was stored."""
    body: dict[str, Any] = {"max_tokens": 0, "echo": True, "temperature": 0}
    async with running(tmp_path, quota={"cached_prompt": 0.5}) as service:
        for fields in ({"prompt": "x" * 30, "logprobs": 0}, {"prompt": "x" * 30, "logprobs": 0}, {"prompt": "y" * 30}):
            answer = await post(service, **body, **fields)
            assert (30, 0) == (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    with sqlite3.connect(tmp_path / "service.db") as database:
        charged = database.execute("SELECT charged_tokens FROM inference_log ORDER BY id").fetchall()
    database.close()
    assert [(30,), (15,), (30,)] == charged


async def test_a_response_of_too_many_is_refused(service: Running, monkeypatch: pytest.MonkeyPatch):
    """Before it has taken the memory; a stream holds nothing, and has no such limit."""
    monkeypatch.setattr(json_encoding, "MAX_PROMPT_LOGPROBS", 100)
    async with service.client() as http:
        body = {"prompt": ["x" * 40, "y" * 40], "max_tokens": 0, "echo": True, "logprobs": 1}
        refused = await http.post(TEXTS, json=body)
        fewer = await http.post(TEXTS, json={**body, "logprobs": 0})
        streamed = await http.post(TEXTS, json={**body, "stream": True})
    assert (400, 200, 200) == (refused.status_code, fewer.status_code, streamed.status_code)
    assert "fewer" in refused.json()["error"]["message"]
    assert "error" not in streamed.text


FILTERS = [("mask", "mask"), ("mask", "off"), ("off", "mask"), ("off", "off")]


@pytest.mark.parametrize(("given", "generated"), FILTERS)
@pytest.mark.parametrize("as_ids", [False, True])
async def test_personal_data_has_no_log_probabilities(tmp_path: Path, given: str, generated: str, as_ids: bool):
    """Where any filter is on, nothing of it is in any field, and no sum of what is left passes for the whole; where
    input is masked, the masked text is what the model read."""
    text = f"my SSN {SSN} is it"
    body: dict[str, Any] = {"prompt": list(map(ord, text)) if as_ids else text, "max_tokens": 0, "echo": True}
    async with running(tmp_path, pii={"input": given, "output": generated}, cache={"persistent": True}) as service:
        answer = await post(service, **body, logprobs=1, prompt_logprobs=1)
        async with service.client() as http:
            streamed = (await http.post(TEXTS, json={**body, "logprobs": 1, "stream": True})).text
    with sqlite3.connect(tmp_path / "service.db") as database:
        cached = database.execute("SELECT answer FROM completion_cache").fetchall()
    database.close()

    (choice,) = answer["choices"]
    said, ranked = choice["logprobs"], choice["prompt_logprobs"]
    shown = "".join(said["tokens"])
    masked = "my SSN [SSN] is it"
    if given == "mask":
        assert (masked, masked) == (choice["text"], shown)
        assert len(masked) - 1 == len([each for each in ranked if each])
    elif generated == "mask":
        assert (masked, "my SSN ") == (choice["text"], shown)
        assert len(text) == len(ranked) == len(said["tokens"])
        assert 6 == len([each for each in ranked if each])
        assert {None} == set(said["token_logprobs"][7:]) == set(ranked[7:])
    else:
        assert (text, text) == (choice["text"], shown)
        assert [] == cached
    if "mask" in (given, generated):
        assert [] == [token for token in said["tokens"] if token.isdigit()]
        assert SSN not in json.dumps(answer) + streamed + str(cached)


async def test_an_echo_is_masked_without_log_probabilities_too(tmp_path: Path):
    """Where completions are filtered, so is the prompt that stands before them; no route shows it otherwise."""
    async with running(tmp_path, pii={"input": "off", "output": "mask"}) as service:
        answer = await post(service, prompt=f"my SSN {SSN}", max_tokens=1, echo=True)
    assert answer["choices"][0]["text"].startswith("my SSN [SSN]")


async def test_a_filter_that_fails_shows_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The request is refused before anything of it is shown."""
    async with running(tmp_path, pii={"input": "off", "output": "mask"}) as service:

        async def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError(SSN)

        monkeypatch.setattr("app.privacy.pool.RedactionPool.redact", fail)
        async with service.client() as http:
            reply = await http.post(TEXTS, json={"prompt": f"my SSN {SSN}", "max_tokens": 1, "echo": True})
    assert 503 == reply.status_code
    assert SSN not in reply.text
