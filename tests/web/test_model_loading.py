"""POST /v1/models/load and /unload, GET /info and /status: who may load what, and what is said of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import ModelConfig, beside
from app.engine.model_load import Load
from app.engine.model_source import LoadSpec
from tests.unit.tiny_encoders import write
from tests.waiting import until
from tests.web.access import Running, running
from tests.web.harness import frames, is_envelope

LOAD, UNLOAD = "/v1/models/load", "/v1/models/unload"
SECOND = {"name": "unused", "served_name": "second", "engine": "echo"}
THIRD = {"model_name": "third", "source": "local", "engine": "echo"}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    (tmp_path / "roots" / "third").mkdir(parents=True)
    return tmp_path / "roots"


@asynccontextmanager
async def service(roots: Path, **model: Any) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    """Run the application with the echo engine: `echo` at once, `second` on its first use, `third` by a load."""
    sections: dict[str, Any] = {"model": {"roots": [str(roots)], **model}, "models": [SECOND]}
    async with running(roots.parent / "data", **sections) as app, app.client() as client:
        yield app, client


async def generate(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/generate", json={"prompt": "hello", "model": model})


async def test_a_model_is_loaded_serves_and_is_unloaded(roots: Path):
    async with service(roots) as (_, client):
        before = await generate(client, "third")
        loaded = await client.post(LOAD, json=THIRD)
        served = await generate(client, "third")
        listed = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        unloaded = await client.post(UNLOAD, json={"model_name": "third"})
        after = await generate(client, "third")

    assert (404, 200, 404) == (before.status_code, served.status_code, after.status_code)
    assert ("third", "ready") == (loaded.json()["name"], loaded.json()["state"])
    assert "third" == served.json()["model"]
    assert ["echo", "third"] == [name for name in listed if name != "second"]
    assert ("third", "unloaded") == (unloaded.json()["name"], unloaded.json()["state"])


async def test_a_load_is_told_as_events(roots: Path):
    async with service(roots) as (_, client):
        body = {**THIRD, "stream": True}
        done = frames((await client.post(LOAD, json=body)).text)
        taken = await client.post(LOAD, json={**body, "dtype": "float16"})

    assert {"progress", "done"} >= {name for name, _ in done}
    assert ("done", "ready") == (done[-1][0], json.loads(done[-1][1])["state"])
    assert 409 == taken.status_code
    assert is_envelope(taken)


async def test_a_load_that_fails_is_told_as_an_event(roots: Path):
    async with service(roots, max_loaded=1) as (_, client):
        sent = await client.post(LOAD, json={**THIRD, "stream": True})

    name, data = frames(sent.text)[-1]
    assert 200 == sent.status_code
    assert ("error", "service_unavailable") == (name, json.loads(data)["error"])
    assert "model.max_loaded" in json.loads(data)["message"]


async def test_a_model_takes_the_place_of_another_of_its_name(roots: Path):
    (roots / "newer").mkdir()
    async with service(roots) as (_, client):
        await client.post(LOAD, json=THIRD)
        newer = {**THIRD, "model_name": "newer", "served_name": "third"}
        refused = await client.post(LOAD, json=newer)
        replaced = await client.post(LOAD, json={**newer, "replace": True})

    assert (409, 200) == (refused.status_code, replaced.status_code)
    assert ("third", "ready") == (replaced.json()["name"], replaced.json()["state"])


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_only_a_role_that_may_load_models_does(roots: Path, path: str):
    body = {"model_name": "second"}
    async with service(roots) as (app, client):
        await client.put("/v1/roles/loader", json={"rights": {"load_models": True}})
        await app.container.loader.load(app.container.loader.configured["second"]).wait()
        replies = []
        for role in ("standard", "loader"):
            async with app.client(await app.key(role=role)) as other:
                replies.append(await other.post(path, json=body))

    assert [403, 200] == [reply.status_code for reply in replies]
    assert is_envelope(replies[0])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model_name": "../secret", "source": "local"}, 403),
        ({"model_name": "/etc", "source": "local"}, 403),
        ({"model_name": "https://example.com/a", "source": "hub"}, 403),
        ({"model_name": "a/b/c", "source": "hub"}, 403),
        ({"model_name": "a/b", "source": "hub", "revision": "../x"}, 403),
        ({"model_name": "models:/a", "source": "mlflow"}, 403),
        ({"model_name": "third", "source": "local", "served_name": "../x"}, 400),
        ({"model_name": "third", "source": "local", "served_name": "a//b"}, 400),
        ({"model_name": "third", "source": "local", "trust_remote_code": True}, 400),
        ({"model_name": "third\n", "source": "local"}, 400),
        ({"model_name": "absent", "source": "local"}, 424),
        ({"model_name": "stranger"}, 404),
        ({"model_name": "second", "dtype": "float16"}, 400),
        ({"model_name": "second", "served_name": "other"}, 400),
    ],
)
async def test_what_may_not_be_loaded_is_refused_before_any_work(roots: Path, body: dict[str, Any], status: int):
    async with service(roots) as (app, client):
        reply = await client.post(LOAD, json=body)
        names = app.container.host.names

    assert status == reply.status_code, reply.text
    assert is_envelope(reply)
    assert body["model_name"].strip() not in reply.text or len(body["model_name"]) < 9
    assert ("echo",) == names


async def test_a_token_for_the_hub_is_in_no_response_and_no_log_line(roots: Path, log_lines: list[Any]):
    async with service(roots) as (_, client):
        body = {**THIRD, "hf_token": "hf_canary"}
        sent = [await client.post(LOAD, json=body), await client.post(LOAD, json={**body, "hf_token": 5})]
        sent += [await client.get(path) for path in ("/status", "/info")]

    assert [200, 400, 200, 200] == [reply.status_code for reply in sent]
    assert "hf_canary" not in "".join(reply.text for reply in sent) + repr(log_lines)


async def test_a_token_for_the_hub_is_for_the_load_of_a_configured_model_too(
    roots: Path, monkeypatch: pytest.MonkeyPatch
):
    specs = list[LoadSpec]()
    async with service(roots) as (app, client):
        load = app.container.loader.load

        def recorded(spec: LoadSpec) -> Load:
            specs.append(spec)
            return load(spec)

        monkeypatch.setattr(app.container.loader, "load", recorded)
        replies = [
            await client.post(LOAD, json={"model_name": "second", "hf_token": "hf_canary"}),
            await client.post(LOAD, json={"model_name": "second", "replace": False, "dtype": None}),
        ]

    assert [200, 200] == [reply.status_code for reply in replies]
    assert ["hf_canary", None] == [spec.hub_token for spec in specs]


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/chat/completions", "/v1/responses", "/v1/chat"])
async def test_a_configured_model_is_loaded_on_its_first_use(roots: Path, path: str):
    """The first request gets 503 and when to come back, or its response if it may wait."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "model": "second"}
    if path == "/v1/generate":
        body = {"prompt": "hello", "model": "second"}
    if path == "/v1/responses":
        body = {"input": "hello", "model": "second"}
    async with service(roots) as (app, client):
        first = await client.post(path, json=body)
        await until(lambda: "second" in app.container.host.loaded)
        later = await client.post(path, json=body)
    async with service(roots, first_use="wait") as (_, client):
        waited = await client.post(path, json=body)

    assert (503, 200, 200) == (first.status_code, later.status_code, waited.status_code)
    assert 1 <= int(first.headers["retry-after"]) <= 30


async def test_a_model_that_a_role_does_not_allow_is_not_loaded_for_its_keys(roots: Path):
    async with service(roots, first_use="wait") as (app, client):
        await client.put("/v1/roles/narrow", json={"rights": {"models": ["echo"]}})
        async with app.client(await app.key(role="narrow")) as other:
            refused = await generate(other, "second")
        names = app.container.host.names

    assert 404 == refused.status_code
    assert ("echo",) == names


async def test_a_model_that_a_request_may_have_loaded_is_listed(roots: Path):
    async with service(roots) as (app, client):
        before = (await client.get("/v1/models")).json()["data"]
        single = (await client.get("/v1/models/second")).json()
        await app.container.loader.load(app.container.loader.configured["second"]).wait()
        after = (await client.get("/v1/models")).json()["data"]

    assert [("echo", "loaded"), ("second", "unloaded")] == [(card["id"], card["status"]["value"]) for card in before]
    assert before[1] == single
    assert ["loaded", "loaded"] == [card["status"]["value"] for card in after]


async def test_probes_and_figures_load_nothing(roots: Path):
    async with service(roots, first_use="wait") as (app, client):
        for path in ("/", "/health", "/readyz", "/info", "/status", "/metrics", "/v1/models", "/v1/models/second"):
            await client.get(path)
        await asyncio.sleep(0.05)
        names = app.container.host.names

    assert ("echo",) == names


async def test_info_needs_no_key_and_says_nothing_secret(roots: Path):
    async with service(roots) as (app, client):
        await client.post(LOAD, json=THIRD)
        await generate(client, "third")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app.app), base_url="http://test") as nobody:
            info = (await nobody.get("/info")).json()
            public = (await nobody.get("/status")).json()
        status = (await client.get("/status")).json()

    models = {model["name"]: model for model in info["models"]}
    assert ("echo", True) == (info["model"], info["ready"])
    assert {"echo": "ready", "third": "ready", "second": "unloaded"} == {
        name: model["state"] for name, model in models.items()
    }
    assert (1, 0) == (models["third"]["requests"], models["echo"]["requests"])
    assert "models" not in public
    assert str(roots) not in json.dumps([info, public])
    assert [model["name"] for model in status["models"]] == list(models)
    assert {"last_error", "restarts"} <= status["models"][0].keys() - models["echo"].keys()


async def test_a_service_that_needs_no_model_lives_without_one(roots: Path):
    """Nothing is loaded at the start; the default model comes with the first request."""
    async with service(roots, preload=False, required=False, first_use="wait") as (app, client):
        ready, health = await client.get("/readyz"), await client.get("/health")
        names = app.container.host.names
        reply = await client.post("/v1/generate", json={"prompt": "hello"})

    assert (200, 200, False) == (ready.status_code, health.status_code, health.json()["model_loaded"])
    assert () == names
    assert (200, "echo") == (reply.status_code, reply.json()["model"])


async def test_a_default_model_that_is_needed_makes_the_service_unready_when_it_is_unloaded(roots: Path):
    async with service(roots) as (_, client):
        await client.post(UNLOAD, json={"model_name": "echo"})
        ready, status = await client.get("/readyz"), (await client.get("/status")).json()
        back = await client.post(LOAD, json={"model_name": "echo"})
        again = await client.get("/readyz")

    assert (503, "unloaded") == (ready.status_code, ready.json()["status"])
    assert "unloaded" == status["state"]
    assert (200, 200) == (back.status_code, again.status_code)


async def test_an_unload_of_what_is_not_loaded_is_404(roots: Path):
    async with service(roots) as (_, client):
        reply = await client.post(UNLOAD, json={"model_name": "second"})

    assert 404 == reply.status_code
    assert is_envelope(reply)


async def test_a_model_that_is_loaded_at_run_time_is_a_label_of_the_metrics(roots: Path):
    async with service(roots) as (_, client):
        await client.post(LOAD, json=THIRD)
        await generate(client, "third")
        metrics = (await client.get("/metrics")).text

    assert 'prompt_tokens_total{model="third"}' in metrics


@pytest.mark.parametrize("path", ["/", "/health", "/readyz", "/status", "/info", "/metrics", "/v1/models"])
async def test_a_probe_or_a_list_loads_no_model(roots: Path, path: str):
    """A model that waits for its first use waits on."""
    async with service(roots, preload=False, required=False, first_use="refuse") as (app, client):
        await client.get(path)

        assert ({}, ()) == (app.container.loader.loads, app.container.host.names)


def test_a_model_beside_an_echo_is_none():
    """Unless that is asked for: whoever loads a model wants its answers."""
    echo = ModelConfig(engine="echo")

    assert "auto" == beside(echo, name="folder").engine
    assert "echo" == beside(echo, name="folder", engine="echo").engine
    assert "serial" == beside(ModelConfig(engine="serial"), name="folder").engine


@pytest.mark.parametrize(
    ("files", "fields", "status", "words"),
    [
        ({"modules.json": []}, {"quantization": "int8"}, 400, "quantization"),
        ({"modules.json": []}, {"engine": "echo"}, 400, "only embeds"),
        ({"config.json": {"architectures": ["BertModel"]}}, {"max_batch_size": 3}, 400, "max_batch_size"),
        ({}, {"task": "embed", "compile": "none"}, 400, "compile"),
        ({"modules.json": []}, {"served_name": "echo"}, 409, "The default model generates"),
        ({"modules.json": []}, {"served_name": "other", "replace": True}, 409, "does something else"),
        ({"modules.json": []}, {"served_name": "other"}, 409, "does something else"),
        ({}, {"source": "mlflow", "model_name": "models:/a/1", "task": "embed"}, 400, "of a registry"),
    ],
)
async def test_an_encoder_is_not_loaded_as_a_model_that_generates(
    roots: Path, files: dict[str, Any], fields: dict[str, Any], status: int, words: str
):
    """Nor under the name of one; what a folder holds its files say."""
    for name, content in files.items():
        write(roots / "third" / name, content)
    (roots / "other").mkdir()
    async with service(roots) as (_, client):
        await client.post(LOAD, json={**THIRD, "model_name": "other"})
        reply = await client.post(LOAD, json={"model_name": "third", "source": "local", **fields})

    assert status == reply.status_code, reply.text
    assert words in reply.text
