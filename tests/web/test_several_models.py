"""Several models behind one service: which are listed, which one serves a request, and what holds while one is gone."""

import asyncio
import json

import pytest

from app.engine.echo import EchoEngine
from tests.waiting import until
from tests.web.harness import (
    BATCH,
    BODIES,
    GENERATE,
    OPENAI_BODIES,
    LoadingEngine,
    RecordingEngine,
    Web,
    is_envelope,
    make_web,
)

RIGHT = {**BODIES, "/v1/generate/batch": BATCH, **OPENAI_BODIES}
every_route = pytest.mark.parametrize("path", RIGHT)
NAMES = ("first", "org/second")


def engines() -> dict[str, RecordingEngine]:
    return {name: RecordingEngine(name) for name in NAMES}


async def test_all_models_are_listed_the_default_one_first():
    web = await make_web(engines=engines())
    async with web.client() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        cards = [(await client.get(f"/v1/models/{name}")).json() for name in NAMES]

    assert list(NAMES) == [card["id"] for card in listed]
    assert cards == listed


@every_route
@pytest.mark.parametrize("model", [None, *NAMES])
async def test_a_request_is_served_by_the_model_that_it_names_or_by_the_default_one(path, model):
    served = engines()
    web = await make_web(engines=served)
    async with web.client() as client:
        reply = await client.post(path, json={**RIGHT[path], **({"model": model} if model else {})})

    expected = model or NAMES[0]
    body = reply.json()
    assert expected == (body["results"][0] if "results" in body else body)["model"]
    assert {expected} == {name for name, engine in served.items() if engine.requests}


@pytest.mark.parametrize("path", [*BODIES, *OPENAI_BODIES])
async def test_a_stream_names_the_model_that_serves_it(path):
    web = await make_web(engines=engines())
    async with web.client() as client:
        reply = await client.post(path, json={**RIGHT[path], "model": NAMES[1], "stream": True})

    data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
    assert NAMES[1] == json.loads(data[-1])["model"]


@every_route
async def test_a_model_that_is_not_loaded_is_404(path):
    served = engines()
    web = await make_web(engines=served)
    async with web.client() as client:
        for stream in (False,) if "batch" in path else (False, True):
            reply = await client.post(path, json={**RIGHT[path], "model": "third", "stream": stream})
            assert 404 == reply.status_code
            assert ("model_not_found" if path in OPENAI_BODIES else "not_found") in reply.text
            assert is_envelope(reply)
    assert not any(engine.requests for engine in served.values())


async def test_models_share_no_cached_response():
    served = engines()
    web = await make_web(engines=served)
    async with web.client() as client:
        replies = [
            (await client.post("/v1/generate", json={**GENERATE, "temperature": 0, "model": name})).json()
            for name in (*NAMES, *NAMES)
        ]

    assert [False, False, True, True] == [reply["cached"] for reply in replies]
    assert [*NAMES, *NAMES] == [reply["model"] for reply in replies]
    assert [1, 1] == [len(engine.requests) for engine in served.values()]


async def test_a_default_model_that_is_unloaded_makes_the_service_unready_and_no_other():
    """Health is as well as ever; the other model still serves."""
    web = await make_web(engines=engines())
    await web.host.unload(NAMES[0], 1)
    async with web.client() as client:
        ready, health = await client.get("/readyz"), await client.get("/health")
        default = await client.post("/v1/chat/completions", json=RIGHT["/v1/chat/completions"])
        other = await client.post("/v1/generate", json={**GENERATE, "model": NAMES[1]})
        listed = (await client.get("/v1/models")).json()["data"]
        status = (await client.get("/status")).json()

    assert ("unloaded", "model unloaded", NAMES[0]) == (status["state"], status["status"], status["model"]["model"])
    assert (503, {"status": "unloaded"}) == (ready.status_code, ready.json())
    assert int(ready.headers["retry-after"]) >= 1
    assert (200, False, NAMES[0]) == (health.status_code, health.json()["model_loaded"], health.json()["model_name"])
    assert (404, 200) == (default.status_code, other.status_code)
    assert [NAMES[1]] == [card["id"] for card in listed]


async def test_probes_and_figures_are_served_while_no_model_is_loaded():
    """None of them loads one."""
    web = await make_web(engines={"only": EchoEngine(model="only")})
    await web.host.unload("only", 1)
    async with web.client() as client:
        replies = {path: await client.get(path) for path in ("/", "/health", "/readyz", "/metrics", "/v1/models")}

    assert {200} == {reply.status_code for path, reply in replies.items() if path != "/readyz"}
    assert "model_loaded 0.0" in replies["/metrics"].text
    assert [] == replies["/v1/models"].json()["data"]
    assert () == web.host.names


async def test_readiness_is_that_of_the_default_model():
    other = {"default": EchoEngine(model="default"), "loading": LoadingEngine(model="loading")}
    default = {"loading": LoadingEngine(model="loading"), "other": EchoEngine(model="other")}

    assert [(200, "ready"), (503, "loading")] == [
        await readiness(await make_web(engines=each)) for each in (other, default)
    ]


async def readiness(web: Web) -> tuple[int, str]:
    async with web.client() as client:
        reply = await client.get("/readyz")
    return reply.status_code, reply.json()["status"]


async def test_an_unload_waits_for_the_streams_of_its_model_and_refuses_new_ones():
    """A stream of another model is not touched."""
    slow = {name: EchoEngine(model=name, token_delay_seconds=0.02) for name in NAMES}
    web = await make_web(engines=slow)
    async with web.client() as client:
        running = asyncio.create_task(client.post("/v1/generate", json={**GENERATE, "stream": True}))
        await until(lambda: slow[NAMES[0]].status().running == 1)
        unloading = asyncio.create_task(web.host.unload(NAMES[0], 5))
        await asyncio.sleep(0)
        refused = await client.post("/v1/generate", json=GENERATE)
        other = await client.post("/v1/generate", json={**GENERATE, "model": NAMES[1]})
        reply = await running
        await unloading

    assert 404 == refused.status_code
    assert "hello" == other.json()["generated_text"]
    assert "event: done" in reply.text
    assert '"finish_reason":"stop"' in reply.text
    assert (NAMES[1],) == web.host.names
