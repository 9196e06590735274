"""POST /v1/embeddings: OpenAI's bytes, its refusals, and the models that are meant for it."""

import asyncio
import base64
import json
import struct
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import httpx
import pytest

from app.engine.echo import EchoEngine
from app.web.http.json_encoding import JsonArray
from app.web.openai.embeddings import encode_vectors
from tests.waiting import until
from tests.web.harness import AUTH, MODEL, Web, is_envelope, make_web
from tests.web.word_encoder import LETTERS, WordEncoder

PATH = "/v1/embeddings"
ENCODER = "org/words"


@pytest.fixture
def encoder() -> WordEncoder:
    return WordEncoder(ENCODER)


@pytest.fixture
async def web(encoder: WordEncoder) -> Web:
    return await make_web(
        engines={MODEL: EchoEngine(model=MODEL)}, encoders={ENCODER: encoder}, logging={"store_text": True}
    )


@pytest.fixture
async def client(web: Web) -> AsyncIterator[httpx.AsyncClient]:
    async with web.client() as client:
        yield client


def numbers(text: str) -> tuple[float, ...]:
    raw = base64.b64decode(text)
    return struct.unpack(f"<{len(raw) // 4}f", raw)


async def test_a_text_has_openais_object(client: httpx.AsyncClient):
    reply = await client.post(PATH, json={"input": "one two", "model": ENCODER})
    body = reply.json()

    assert 200 == reply.status_code
    assert ["object", "data", "model", "usage"] == list(body)
    assert ("list", ENCODER, {"prompt_tokens": 2, "total_tokens": 2}) == (body["object"], body["model"], body["usage"])
    (only,) = body["data"]
    assert ["object", "index", "embedding"] == list(only)
    assert ("embedding", 0, len(LETTERS)) == (only["object"], only["index"], len(only["embedding"]))


async def test_base64_holds_the_same_numbers_as_little_endian_float32(client: httpx.AsyncClient):
    texts = ["one two", "three"]
    plain = (await client.post(PATH, json={"input": texts, "encoding_format": "float"})).json()["data"]
    encoded = (await client.post(PATH, json={"input": texts, "encoding_format": "base64"})).json()["data"]
    assert [0, 1] == [each["index"] for each in encoded]
    assert [each["embedding"] for each in plain] == [list(numbers(each["embedding"])) for each in encoded]


@pytest.mark.parametrize(
    ("given", "count"),
    [("one", 1), (["one", "two"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), (["a"] * 2048, 2048)],
)
async def test_every_form_of_input_is_taken(given: Any, count: int, client: httpx.AsyncClient):
    reply = await client.post(PATH, json={"input": given})
    assert list(range(count)) == [each["index"] for each in reply.json()["data"]]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "Field required"),
        ({"input": ""}, "input", "must not hold an empty text, as it does at index 0"),
        ({"input": ["a", ""]}, "input", "at index 1"),
        ({"input": []}, "input", "not empty"),
        ({"input": [[]]}, "input", "not empty"),
        ({"input": ["a", 1]}, "input", "must be a text, a list of texts"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": [-1]}, "input", "must be a text"),
        ({"input": [1, 900]}, "input", "names a token at index 0"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": 99}, "dimensions", f"1 to {len(LETTERS)}"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must leave a token"),
        ({"input": "a", "prompt_name": "poem"}, "prompt_name", "it has: query"),
        ({"input": [1], "prompt_name": "query"}, "prompt_name", "needs texts"),
        ({"input": [1], "input_type": "query"}, "input_type", "needs texts"),
        ({"input": "a", "model": MODEL}, "model", f"does not embed texts; these do: {ENCODER}"),
        ({"input": "a", "temperature": 1}, "temperature", "there is no such field"),
    ],
)
async def test_a_request_that_is_wrong_is_400_and_names_the_field(
    body: dict[str, Any], param: str, message: str, client: httpx.AsyncClient, encoder: WordEncoder
):
    reply = await client.post(PATH, json=body)
    assert (400, True) == (reply.status_code, is_envelope(reply)), reply.text
    assert (param, "invalid_request_error") == (reply.json()["error"]["param"], reply.json()["error"]["code"])
    assert message in reply.json()["error"]["message"]
    assert [] == encoder.requests


async def test_a_text_that_is_too_long_is_refused_by_its_index_or_cut(client: httpx.AsyncClient):
    body = {"input": ["short", "word " * 50]}
    refused = await client.post(PATH, json=body)
    assert (400, "context_length_exceeded", "input") == (
        refused.status_code,
        refused.json()["error"]["code"],
        refused.json()["error"]["param"],
    )
    assert "at index 1 has 50 tokens, and the model embeds at most 40" in refused.json()["error"]["message"]
    for limit, tokens in ((-1, 41), (3, 4)):
        cut = await client.post(PATH, json={**body, "truncate_prompt_tokens": limit})
        assert tokens == cut.json()["usage"]["prompt_tokens"]


async def test_vectors_are_cut_to_the_dimensions_of_the_request(client: httpx.AsyncClient):
    (vector,) = (await client.post(PATH, json={"input": "a", "dimensions": 3})).json()["data"]
    assert 3 == len(vector["embedding"])


@pytest.mark.parametrize(
    ("fields", "name", "kind"),
    [
        ({"prompt_name": "query"}, "query", None),
        ({"input_type": "search_query"}, None, "query"),
        ({"input_type": "passage"}, None, "document"),
        ({}, None, None),
    ],
)
async def test_a_request_may_name_what_kind_of_text_it_is(
    fields: dict[str, Any], name: str | None, kind: str | None, client: httpx.AsyncClient, encoder: WordEncoder
):
    assert 200 == (await client.post(PATH, json={"input": "a", **fields})).status_code
    assert (name, kind) == (encoder.requests[0].prompt_name, encoder.requests[0].input_type)


async def test_null_is_the_same_as_nothing(client: httpx.AsyncClient):
    optional = ("model", "encoding_format", "dimensions", "user", "truncate_prompt_tokens", "prompt_name", "input_type")
    reply = await client.post(PATH, json={"input": "a", **dict.fromkeys(optional)})
    assert (200, list) == (reply.status_code, type(reply.json()["data"][0]["embedding"]))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/chat", "/v1/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_only_embeds_generates_nothing_and_says_where_to_go(
    path: str, stream: bool, client: httpx.AsyncClient
):
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    reply = await client.post(path, json={**prompt, "model": ENCODER, "stream": stream})
    assert 400 == reply.status_code
    assert "send it to /v1/embeddings" in reply.text
    assert is_envelope(reply)


async def test_a_model_that_is_not_loaded_is_404(client: httpx.AsyncClient):
    reply = await client.post(PATH, json={"input": "a", "model": "absent"})
    assert (404, "model_not_found") == (reply.status_code, reply.json()["error"]["code"])


async def test_a_service_without_such_a_model_says_so():
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)})
    async with web.client() as client:
        reply = await client.post(PATH, json={"input": "a"})
    assert 400 == reply.status_code
    assert "no model of this service does" in reply.json()["error"]["message"]


async def test_both_kinds_of_models_are_listed_and_chat_remains_the_default(client: httpx.AsyncClient):
    cards = (await client.get("/v1/models")).json()["data"]
    card = (await client.get(f"/v1/models/{ENCODER}")).json()

    assert [MODEL, ENCODER] == [each["id"] for each in cards]
    assert [["text"], ["embeddings"]] == [each["architecture"]["output_modalities"] for each in cards]
    assert "embedding" not in cards[0]
    assert card == cards[1]
    assert (len(LETTERS), [], 40, ["query"]) == (
        card["embedding"]["dimension"],
        card["embedding"]["dimensions"],
        card["embedding"]["max_tokens"],
        card["embedding"]["prompts"],
    )
    assert ("ready", MODEL) == (
        (await client.get("/status")).json()["embeddings"][ENCODER]["state"],
        (await client.get("/health")).json()["model_name"],
    )


async def test_personal_data_never_reaches_the_model(client: httpx.AsyncClient, encoder: WordEncoder):
    assert 200 == (await client.post(PATH, json={"input": ["write to jane.doe@example.com"]})).status_code
    assert ("write to [EMAIL]",) == encoder.requests[0].inputs


async def test_personal_data_is_400_where_the_policy_says_so():
    web = await make_web(
        engines={MODEL: EchoEngine(model=MODEL)}, encoders={ENCODER: WordEncoder(ENCODER)}, pii={"input": "block"}
    )
    async with web.client() as client:
        reply = await client.post(PATH, json={"input": "write to jane.doe@example.com"})
    assert (400, "pii_blocked") == (reply.status_code, reply.json()["error"]["code"])


async def test_a_large_response_is_complete_and_encoded_off_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    """Thousands of vectors would hold up every other request while they become JSON."""
    threads: list[int] = []

    def encode(vectors: Sequence[bytes], encoding: Literal["float", "base64"]) -> JsonArray:
        threads.append(threading.get_ident())
        return encode_vectors(vectors, encoding)

    monkeypatch.setattr("app.web.openai.embeddings.encode_vectors", encode)
    reply = await client.post(PATH, json={"input": ["word"] * 2048})
    assert 2048 == len(json.loads(reply.content)["data"])
    assert 1 == len(threads)
    assert threading.get_ident() not in threads


async def test_a_client_that_hangs_up_ends_its_request():
    encoder = WordEncoder(ENCODER, seconds=60)
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, encoders={ENCODER: encoder})
    async with web.listening() as port, httpx.AsyncClient(headers=AUTH) as client:
        sending = asyncio.create_task(client.post(f"http://127.0.0.1:{port}{PATH}", json={"input": "a"}))
        await until(lambda: bool(encoder.live))
        sending.cancel()
        await until(lambda: not encoder.live)


async def test_requests_count_against_the_rate_and_carry_its_headers():
    web = await make_web(
        engines={MODEL: EchoEngine(model=MODEL)},
        encoders={ENCODER: WordEncoder(ENCODER)},
        rate_limit={"requests_per_minute": 1, "burst_size": 1},
    )
    async with web.client() as client:
        first = await client.post(PATH, json={"input": "a"})
        second = await client.post(PATH, json={"input": "a"})
    assert (200, "1", 429) == (first.status_code, first.headers["x-ratelimit-limit-requests"], second.status_code)


async def test_a_request_without_a_key_is_401(web: Web):
    async with web.client(**{"X-API-Key": "wrong-key-0000"}) as client:
        reply = await client.post(PATH, json={"input": "a"})
    assert (401, True) == (reply.status_code, is_envelope(reply))


async def test_an_encoder_that_loads_is_503_and_leaves_chat_alone():
    class Loading(WordEncoder):
        async def start(self) -> None:
            return

    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, encoders={ENCODER: Loading(ENCODER)})
    async with web.client() as client:
        reply = await client.post(PATH, json={"input": "a"})
        ready = await client.get("/readyz")
        listed = (await client.get("/v1/models")).json()["data"][1]
    assert (503, 200) == (reply.status_code, ready.status_code)
    assert "retry-after" in reply.headers
    assert ("loading", None) == (listed["status"]["value"], listed["max_model_len"])
