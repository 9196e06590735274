"""Several answers, log-probabilities and batches on the wire."""

import json

import pytest

from app.errors import ContextLengthExceeded, EngineBusy
from tests.web.harness import BODIES, CHAT, GENERATE, ScriptedService, frames, is_envelope, make_web

TOP = [{"text": "Hel0", "logprob": 0.0}, {"text": "Hel1", "logprob": -1.0}]


async def test_generate_answers_with_as_many_completions_as_requested(client):
    body = {**GENERATE, "n": 3, "logprobs": 2}

    reply = (await client.post("/v1/generate", json=body)).json()

    assert ["Hello"] * 3 == [completion["text"] for completion in reply["completions"]]
    assert ("Hello", "stop", 6) == (reply["generated_text"], reply["finish_reason"], reply["tokens_generated"])
    for completion in reply["completions"]:
        assert {"text", "finish_reason", "tokens"} == set(completion)
        assert {"text": "Hel", "logprob": -0.5, "top": TOP} == completion["tokens"][0]
        assert ["Hel", "lo"] == [token["text"] for token in completion["tokens"]]


@pytest.mark.parametrize(
    ("fields", "count", "keys"),
    [
        ({"n": 2}, 2, {"text", "finish_reason"}),
        ({"logprobs": True}, 1, {"text", "finish_reason", "tokens"}),
        ({"n": 1}, 0, set()),
        ({"logprobs": False}, 0, set()),
    ],
)
async def test_chat_lists_its_completions_where_they_say_more_than_the_message(client, fields, count, keys):
    reply = (await client.post("/v1/chat", json={**CHAT, **fields})).json()

    assert {"role": "assistant", "content": "Hello"} == reply["message"]
    assert bool(count) == ("completions" in reply)
    assert count == len(reply.get("completions", ()))
    assert all(keys == set(completion) for completion in reply.get("completions", ()))


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_of_several_completions_says_which_each_delta_belongs_to(client, path):
    reply = await client.post(path, json={**BODIES[path], "stream": True, "n": 2, "logprobs": 2})

    *deltas, (_, done) = [(name, json.loads(data)) for name, data in frames(reply.text)]
    token = {"text": "Hel", "logprob": -0.5, "top": TOP}
    assert {"content": "Hel", "index": 0, "tokens": [token]} == deltas[0][1]
    assert [("Hel", 0), ("Hel", 1), ("lo", 0), ("lo", 1)] == [(data["content"], data["index"]) for _, data in deltas]
    endings = [{"index": index, "finish_reason": "stop", "tokens_generated": 2} for index in range(2)]
    assert endings == done["completions"]
    assert 4 == done["tokens_generated"] == done["usage"]["completion_tokens"]


async def test_a_batch_answers_each_prompt_as_generate_would(web, client):
    fields = {"n": 2, "logprobs": 1, "max_tokens": 5, "seed": 3}

    single = (await client.post("/v1/generate", json={**GENERATE, **fields})).json()
    del single["output"]  # another name of generated_text
    batch = (await client.post("/v1/generate/batch", json={"prompts": ["hello"] * 20, **fields})).json()

    assert {"results", "request_id"} == set(batch)
    assert [single | {"request_id": batch["request_id"]}] * 20 == batch["results"]
    assert 21 == len({request.id for request in web.service.requests})
    assert 1 == len({(request.sampling, request.unset, request.n) for request in web.service.requests})


async def test_a_prompt_that_cannot_be_answered_has_its_error_in_place():
    class Picky(ScriptedService):
        async def generate(self, request, principal):
            if request.text == "long":
                raise ContextLengthExceeded(prompt_tokens=9, max_tokens=9, limit=10)
            if request.text == "defect":
                raise RuntimeError("secret words")
            async for event in super().generate(request, principal):
                yield event

    web = await make_web(Picky())
    async with web.client() as client:
        reply = await client.post("/v1/generate/batch", json={"prompts": ["a", "long", "b", "defect"]})

    first, long, second, defect = reply.json()["results"]
    assert 200 == reply.status_code
    assert ["a", "b"] == [first["prompt"], second["prompt"]]
    assert {"error"} == set(long) == set(defect)
    assert {"error", "message", "details", "timestamp", "request_id"} == set(long["error"])
    assert ["context_length_exceeded", "internal_server_error"] == [one["error"]["error"] for one in (long, defect)]
    assert {9, 10} == set(long["error"]["details"].values())
    assert "secret words" not in reply.text


async def test_a_service_that_takes_no_prompt_of_a_batch_refuses_it_with_its_status():
    web = await make_web(ScriptedService(refusal=EngineBusy("Full.", retry_after=3)))
    async with web.client() as client:
        reply = await client.post("/v1/generate/batch", json={"prompts": ["a", "b"]})

    assert (503, "3") == (reply.status_code, reply.headers["retry-after"])
    assert is_envelope(reply)


async def test_a_batch_is_not_streamed(client):
    reply = await client.post("/v1/generate/batch", json={"prompts": ["a"], "stream": True})

    assert 400 == reply.status_code
    reason = "is not possible for a batch; send the prompts to /v1/generate one by one"
    assert [{"field": "stream", "reason": reason}] == reply.json()["details"]["errors"]
