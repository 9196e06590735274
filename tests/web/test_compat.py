"""The routes of older services: their fields, their defaults and limits, and that they take the one path of all."""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.engine.echo import EchoEngine
from tests.web.access import Running, running
from tests.web.harness import (
    COMPAT_BODIES,
    KEY,
    MODEL,
    OneKey,
    RecordingEngine,
    ScriptedService,
    is_envelope,
    make_web,
)

CANARY = "jane.doe@example.com"
SAYS = "{0} {0}".format(f"mail {CANARY} now")


def data_of(reply: httpx.Response) -> list[Any]:
    """Return the data of each event of a stream, in their order."""
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_generate_with_parameters_answers_with_scored_completions(client):
    parameters = {"temperature": 0.7, "max_new_tokens": 200, "top_p": 0.9, "num_return_sequences": 2}
    body = {"model_name": MODEL, "prompt": "hello", "parameters": {**parameters, "stop_sequences": []}}
    reply = (await client.post("/generate", json=body)).json()

    assert {"success", "request_time", "completions"} == reply.keys()
    assert reply["success"] is True
    assert 0 <= reply["request_time"] < 5
    tokens = [{"text": "Hel", "logprob": -0.5}, {"text": "lo", "logprob": -0.5}]
    assert [{"text": "Hello", "tokens": tokens}] * 2 == reply["completions"]


async def test_generate_with_parameters_hands_all_of_them_on():
    web = await make_web()
    parameters = {"temperature": 0.3, "max_new_tokens": 7, "top_p": 0.9, "stop_sequences": ["x"]}
    async with web.client() as client:
        await client.post("/generate", json={"prompt": "hello", "parameters": parameters})
        await client.post("/generate", json={"prompt": "hello", "model_name": MODEL})
    first, second = web.service.requests

    sampling = first.sampling
    assert (0.3, 7, 0.9, ("x",)) == (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.stop)
    assert (MODEL, None) == (second.model, second.max_tokens)


async def test_tokens_are_left_out_where_a_role_may_not_see_log_probabilities():
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)})
    keys = web.app.state.container.keys
    assert isinstance(keys, OneKey)
    keys.rights = type(keys.rights)(raw_logprobs=False)
    async with web.client() as client:
        reply = await client.post("/generate", json={"prompt": "hello", "parameters": {}})

    assert (200, [{"text": "hello", "tokens": []}]) == (reply.status_code, reply.json()["completions"])


async def test_tokens_are_left_out_where_a_model_has_no_log_probabilities():
    engine = RecordingEngine()
    engine.facts = {"capabilities": type(engine.info.capabilities)(unsupported=("logprobs", "grammar"))}
    web = await make_web(engines={MODEL: engine})
    async with web.client() as client:
        reply = await client.post("/generate", json={"prompt": "hello", "parameters": {}})

    assert [{"text": "hello", "tokens": []}] == reply.json()["completions"]


async def test_a_plain_generate_answers_with_the_prompt_and_its_continuation(client):
    reply = await client.post("/generate", json={"prompt": "hello", "max_new_tokens": 50})

    assert {"generated_text": "helloHello"} == reply.json()


@pytest.mark.parametrize(
    ("path", "field", "default", "most", "settings"),
    [
        ("/generate", "max_new_tokens", 50, 200, {}),
        ("/predict", "max_length", 100, 2048, {}),
        ("/predict/batch", "max_length", 100, 2048, {}),
        ("/generate", "max_new_tokens", 3, 5, {"generate_max_new_tokens": 3, "generate_most_new_tokens": 5}),
        ("/predict", "max_length", 3, 5, {"predict_max_length": 3, "predict_most_length": 5}),
    ],
)
async def test_each_route_has_the_default_and_the_limit_of_its_service(path, field, default, most, settings):
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, compat=settings)
    prompt = {"prompts": ["x" * 2048]} if "batch" in path else {"prompt": "x" * 2048}
    async with web.client() as client:
        replies = [
            await client.post(path, json={**prompt, **fields}) for fields in ({}, {field: most}, {field: most + 1})
        ]

    def generated_chars(reply: httpx.Response) -> int:
        body = reply.json()["results"][0] if "batch" in path else reply.json()
        return len(body["generated_text"]) - (2048 if path == "/generate" else 0)

    assert [default, most] == [generated_chars(reply) for reply in replies[:2]]
    assert (400, "validation_error") == (replies[2].status_code, replies[2].json()["error"])
    assert f"{field} must be at most {most} " in replies[2].json()["message"]


async def test_predict_takes_prompts_of_so_many_tokens_and_no_more():
    """2048 of them unless it is configured otherwise; of many prompts each by itself."""
    configured = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, compat={"predict_most_prompt_tokens": 5})
    usual = await make_web(engines={MODEL: EchoEngine(model=MODEL, context_length=4096)})
    async with configured.client() as client:
        few, many = [await client.post("/predict", json={"prompt": "x" * count}) for count in (5, 6)]
        batch = await client.post("/predict/batch", json={"prompts": ["x" * 6, "x" * 5]})
        elsewhere = await client.post("/v1/generate", json={"prompt": "x" * 6})
    async with usual.client() as client:
        codes = [(await client.post("/predict", json={"prompt": "x" * n})).status_code for n in (2048, 2049)]

    assert [200, 400, 200] == [reply.status_code for reply in (few, many, elsewhere)]
    assert ("validation_error", True) == (many.json()["error"], "prompt has 6 tokens" in many.json()["message"])
    assert ["error", "generated_text"] == [next(iter(each)) for each in batch.json()["results"]]
    assert [200, 400] == codes


async def test_a_default_number_of_tokens_gives_way_to_a_long_prompt():
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL, context_length=100)})
    async with web.client() as client:
        replies = [await client.post(path, json={"prompt": "x" * 90}) for path in ("/generate", "/predict")]

    assert ["x" * 100, "x" * 10] == [reply.json()["generated_text"] for reply in replies]


async def test_predict_answers_with_the_documented_fields(client):
    body = {"prompt": "hello", "max_length": 100, "temperature": 0.7, "top_p": 0.95, "stop_tokens": []}
    reply = (await client.post("/predict", json=body)).json()

    fields = "generated_text prompt tokens_generated processing_time model_name model_version timestamp"
    assert set(fields.split()) == reply.keys()
    known = ("Hello", "hello", 2, MODEL, "unversioned")
    names = ("generated_text", "prompt", "tokens_generated", "model_name", "model_version")
    assert known == tuple(reply[name] for name in names)
    assert 0 <= reply["processing_time"] < 5
    assert "T" in reply["timestamp"]


async def test_predict_names_the_revision_of_the_model():
    web = await make_web(engines={MODEL: RecordingEngine(revision="v3")})
    async with web.client() as client:
        reply = await client.post("/predict", json={"prompt": "hello"})

    assert "v3" == reply.json()["model_version"]


async def test_predict_draws_from_the_nucleus_that_is_configured_unless_a_request_names_one():
    web = await make_web(compat={"predict_top_p": 0.5})
    async with web.client() as client:
        for fields in ({}, {"top_p": 0.9}, {"top_p": 0}):
            await client.post("/predict", json={"prompt": "hello", **fields})
    nuclei = [(request.sampling.top_p, request.sampling.temperature) for request in web.service.requests]

    # Without any probability mass the likeliest token alone is left.
    assert [(0.5, 0.0), (0.9, 0.0), (1.0, 0.0)] == nuclei
    assert ["temperature" in request.unset for request in web.service.requests] == [True, True, False]


async def test_a_prompt_of_a_batch_that_fails_has_its_error_in_place():
    engine = EchoEngine(model=MODEL, context_length=20)
    web = await make_web(engines={MODEL: engine})
    async with web.client() as client:
        reply = await client.post("/predict/batch", json={"prompts": ["hello", "x" * 30], "max_length": 5})
    right, wrong = reply.json()["results"]

    assert 200 == reply.status_code
    assert ("hello", "context_length_exceeded") == (right["generated_text"], wrong["error"]["error"])


async def test_a_stream_has_texts_then_how_it_ended_then_done(client):
    reply = await client.post("/v1/stream", json={"prompt": "hello", "max_new_tokens": 32, "top_k": 5, "stop": "x"})

    assert reply.headers["content-type"].startswith("text/event-stream")
    ended = {"model": MODEL, "cached": False, "finish_reason": "stop", "tokens_generated": 2}
    assert [{"text": "Hel"}, {"text": "lo"}, ended, "[DONE]"] == data_of(reply)
    assert "event:" not in reply.text


async def test_a_stream_that_fails_midway_says_so_and_ends():
    web = await make_web(ScriptedService(steps=["Hel", RuntimeError("secret words")]))
    async with web.client() as client:
        reply = await client.post("/v1/stream", json={"prompt": "hello"})
    text, failed, done = data_of(reply)

    assert ({"text": "Hel"}, "internal_server_error", "[DONE]") == (text, failed["error"]["error"], done)
    assert "secret" not in reply.text


async def test_generate_also_names_its_text_output(client):
    """Beside the name that it has in another system."""
    reply = (await client.post("/v1/generate", json={"prompt": "hello", "max_new_tokens": 32})).json()

    assert (MODEL, "Hello", False) == (reply["model"], reply["output"], reply["cached"])


@pytest.mark.parametrize("path", [*COMPAT_BODIES, "/load_model", "/unload_model", "/generate_apikey"])
async def test_without_these_routes_their_paths_are_those_of_nothing(path):
    web = await make_web(compat={"enabled": False})
    async with web.client() as client:
        reply = await client.post(path, json={})

    assert 404 == reply.status_code
    assert path not in web.app.openapi()["paths"]


@pytest.mark.parametrize("headers", [{"x-API-Key": KEY}, {"x-api-key": KEY}, {"Authorization": f"Bearer {KEY}"}])
@pytest.mark.parametrize("path", COMPAT_BODIES)
async def test_a_key_is_taken_from_either_header(web, path, headers):
    async with web.client(**headers) as client:
        reply = await client.post(path, json=COMPAT_BODIES[path])

    assert 200 == reply.status_code


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": SAYS}),
        ("/generate", {"prompt": SAYS, "parameters": {}}),
        ("/predict", {"prompt": SAYS}),
        ("/predict/batch", {"prompts": [SAYS]}),
        ("/v1/stream", {"prompt": SAYS}),
    ],
)
@pytest.mark.parametrize("pii", [{}, {"input": "off"}])
async def test_personal_data_goes_neither_in_nor_out(path, body, pii, log_lines):
    """Not in tokens either; with the input filter off, nothing but the prompt shows it, and that is the client's."""
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)}, pii=pii)
    async with web.client() as client:
        reply = await client.post(path, json=body)

    shown = reply.text.replace(SAYS, "")
    assert 200 == reply.status_code
    assert "[EMAIL]" in "".join(each.get("text", "") for each in data_of(reply)[:-1]) if "stream" in path else shown
    assert CANARY not in shown + str(log_lines)
    assert '"@"' not in shown


@pytest.mark.parametrize("path", COMPAT_BODIES)
async def test_each_request_has_its_row_in_the_inference_log(tmp_path, path):
    async with running(tmp_path) as service, service.client() as client:
        reply = await client.post(path, json=COMPAT_BODIES[path])
    with sqlite3.connect(tmp_path / "service.db") as database:
        rows = database.execute("SELECT route, status FROM inference_log").fetchall()

    assert (200, [(path, 200)]) == (reply.status_code, rows)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"prompt": "hello", "parameters": {}, "max_new_tokens": 5}),
        ("/generate", {"prompt": "hello", "parameters": {"max_tokens": 5}}),
        ("/generate", {"prompt": ""}),
        ("/predict", {"prompt": "hello", "temperature": 2.1}),
        ("/predict", {"prompt": "hello", "max_length": 0}),
        ("/predict/batch", {"prompts": []}),
        ("/v1/stream", {"prompt": "hello", "stream": False}),
    ],
)
async def test_what_a_service_never_took_is_refused_in_the_envelope(client, path, body):
    reply = await client.post(path, json=body)

    assert (400, True) == (reply.status_code, is_envelope(reply))


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A folder from which models may be loaded, with one in it."""
    (tmp_path / "roots" / "third").mkdir(parents=True)
    return tmp_path / "roots"


KNOWN = [
    {"name": "third", "served_name": "third", "engine": "echo"},
    {"name": "owner/model", "served_name": "owner/model", "source": "hub", "engine": "echo"},
]
"""What is loaded without a worker; anything else would be computed."""


@asynccontextmanager
async def loading_service(roots: Path) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """Run the application with the echo engine, which is told to load what it knows."""
    async with (
        running(roots.parent / "data", model={"roots": [str(roots)]}, models=KNOWN) as app,
        app.client() as client,
    ):
        yield app, client


@pytest.mark.parametrize("name", ["third", "owner/model"])
async def test_a_model_is_loaded_generates_and_is_unloaded(roots: Path, name: str):
    """The one that was loaded last is the current one."""
    async with loading_service(roots) as (_, client):
        loaded = await client.post("/load_model", json={"model_name": name, "device": "cpu", "hf_token": None})
        again = await client.post("/load_model", json={"model_name": name})
        body = {"model_name": name, "prompt": "hello", "parameters": {}}
        served = await client.post("/generate", json=body)
        unloaded = await client.post("/unload_model")
        after = await client.post("/generate", json=body)
        default = await client.post("/generate", json={"prompt": "hello"})

    assert (200, {"message": f"Modelo {name} carregado com sucesso."}) == (loaded.status_code, loaded.json())
    assert loaded.json() == again.json()
    assert (200, "hello") == (served.status_code, served.json()["completions"][0]["text"])
    assert (200, {"message": f"Modelo {name} descarregado com sucesso."}) == (unloaded.status_code, unloaded.json())
    assert (404, 200) == (after.status_code, default.status_code)


async def test_the_default_model_can_be_unloaded_and_loaded_again(roots: Path):
    async with loading_service(roots) as (_, client):
        unloaded = await client.post("/unload_model")
        without = [await client.post("/generate", json={"prompt": "hello"}), await client.post("/unload_model")]
        loaded = await client.post("/load_model", json={"model_name": "echo"})
        again = await client.post("/generate", json={"prompt": "hello"})

    assert {"message": "Modelo echo descarregado com sucesso."} == unloaded.json()
    assert [404, 404] == [reply.status_code for reply in without]
    assert (200, 200) == (loaded.status_code, again.status_code)


@pytest.mark.parametrize("name", ["/etc", "../roots/third", ".", "missing/../third", "https://example.com/a"])
async def test_nothing_else_than_the_rules_allow_is_loaded(roots: Path, name: str):
    async with loading_service(roots) as (_, client):
        reply = await client.post("/load_model", json={"model_name": name})

    assert (403, True) == (reply.status_code, is_envelope(reply))


@pytest.mark.parametrize("path", ["/load_model", "/unload_model"])
async def test_only_a_role_that_may_load_models_loads_and_unloads(roots: Path, path: str):
    async with loading_service(roots) as (app, client):
        async with app.client(await app.key()) as other:
            refused = await other.post(path, json={"model_name": "third"})
        await client.put("/v1/roles/loader", json={"rights": {"load_models": True}})
        async with app.client(await app.key(role="loader")) as loader:
            granted = await loader.post(path, json={"model_name": "third"})

    assert (403, 200) == (refused.status_code, granted.status_code)
