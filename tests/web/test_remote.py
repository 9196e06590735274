"""A service whose model is another server: how it is configured, what it reports, and what stays in front."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import load_settings
from app.errors import ConfigError
from app.main import create_app
from tests.unit.engine.remote.scripted_server import (
    CARD,
    HELLO,
    Reply,
    ScriptedServer,
    chunk,
    engine_on,
    serving,
    usage,
)
from tests.waiting import HANG_SECONDS, until
from tests.web.harness import AUTH, CHAT, KEY, Web, make_web, started

CHATS = "/v1/chat/completions"


@asynccontextmanager
async def web_on(*servers: ScriptedServer, **settings: Any) -> AsyncIterator[Web]:
    async with engine_on(*servers, **settings) as engine:
        yield await make_web(engines={"m": engine}, rate_limit={"enabled": False})


async def test_the_configuration_makes_a_service_of_a_server(tmp_path: Path):
    """With nothing but its address; the model has the configured name in front and its own behind."""
    server = ScriptedServer(models=Reply.json({"data": [CARD | {"id": "there"}]}))
    async with serving(server):
        settings = load_settings(
            "absent.yml",
            None,
            app={"data_dir": tmp_path},
            security={"api_key": KEY},
            model={"engine": "remote", "name": "here"},
            remote={"base_urls": [server.url]},
        )
        app = create_app(settings)
        async with started(app), asyncio.timeout(HANG_SECONDS):
            await app.state.container.host.default.engine.wait_ready()
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTH) as client:
                reply = (await client.post(CHATS, json=CHAT)).json()
                ready = await client.get("/readyz")

    assert ("here", "Hello") == (reply["model"], reply["choices"][0]["message"]["content"])
    assert (200, "there") == (ready.status_code, server.received[0].body["model"])


def test_an_engine_without_a_server_is_no_configuration():
    settings = load_settings("absent.yml", None, model={"engine": "remote"}, security={"api_key": KEY})

    with pytest.raises(ConfigError, match=r"remote\.base_urls"):
        create_app(settings)


async def test_the_servers_are_reported_without_their_addresses():
    """In /status and /metrics, each by its number; a service without one that answers is not ready."""
    servers = [ScriptedServer(), ScriptedServer()]
    async with web_on(*servers, api_key="sk-secret") as web, web.client() as client:
        await until(lambda: all(each.ready for each in web.host.default.engine.status().upstreams))
        await servers[1].stop()
        for _ in range(3):
            await client.post(CHATS, json=CHAT | {"cache": False, "temperature": 1})
        await servers[0].stop()
        failed = await client.post(CHATS, json=CHAT | {"temperature": 1})
        ready = await client.get("/readyz")
        status, metrics = (await client.get("/status")).json(), (await client.get("/metrics")).text

    assert (503, "unresponsive") == (ready.status_code, ready.json()["status"])
    assert 503 == failed.status_code
    assert [(1, False), (2, False)] == [(each["number"], each["ready"]) for each in status["engine"]["upstreams"]]
    assert 'upstream_ready{model="m",upstream="1"} 0.0' in metrics
    assert 'upstream_failures_total{model="m",upstream="1"} 1.0' in metrics
    assert not [each for each in ("127.0.0.1", "sk-secret") if each in f"{status} {metrics} {failed.text}"]


async def test_a_length_that_is_estimated_is_said_to_be_and_what_is_charged_is_not():
    """A session is fitted by the estimate; the usage is what the server counted."""
    server = ScriptedServer([Reply([chunk("Hello", finish_reason="stop"), usage(7, 2)])])
    async with web_on(server, tokenizer="none") as web, web.client() as client:
        reply = (await client.post("/v1/chat", json={**CHAT, "session_id": "s"})).json()
        metrics = (await client.get("/metrics")).text

    assert (True, 7, 2) == (
        reply["context"]["estimated"],
        reply["usage"]["prompt_tokens"],
        reply["usage"]["completion_tokens"],
    )
    assert reply["context"]["prompt_tokens"] > 7
    assert 'prompt_tokens_total{model="m"} 7.0' in metrics


async def test_history_that_may_not_fit_is_left_out_by_the_estimate():
    models = Reply.json({"data": [CARD | {"max_model_len": 200}]})
    server = ScriptedServer(models=models)
    async with web_on(server, tokenizer="none") as web, web.client() as client:
        reply: dict[str, Any] = {}
        for number in range(5):
            message = {"role": "user", "content": f"{number} " + "word " * 20}
            body = {"messages": [message], "session_id": "s", "max_tokens": 20}
            reply = (await client.post("/v1/chat", json=body)).json()

    assert (200, 1) == (reply["context"]["limit"], reply["context"]["turns_kept"])
    assert 3 == len(server.received[-1].body["messages"])


async def test_personal_data_reaches_no_other_server_and_no_client():
    server = ScriptedServer([Reply([chunk("Write to bob@exam"), chunk("ple.com"), chunk(finish_reason="stop")])])
    async with web_on(server) as web, web.client() as client:
        body = {"messages": [{"role": "user", "content": "I am ann@example.com"}]}
        reply = (await client.post(CHATS, json=body)).json()

    assert "I am [EMAIL]" == server.received[0].body["messages"][-1]["content"]
    assert "Write to [EMAIL]" == reply["choices"][0]["message"]["content"]


async def test_an_equal_request_is_not_sent_again():
    """The cache stands in front of the server."""
    server = ScriptedServer()
    async with web_on(server) as web, web.client() as client:
        replies = [await client.post(CHATS, json=CHAT | {"temperature": 0}) for _ in range(2)]

    assert ["MISS", "HIT"] == [reply.headers["x-cache"] for reply in replies]
    assert 1 == len(server.received)


@pytest.mark.parametrize(
    ("reply", "status"),
    [(Reply(status=503), 503), (Reply(status=401), 503), (Reply.json({}, 429), 503), (Reply.json({}, 400), 400)],
)
async def test_a_server_s_refusal_is_this_service_s_own_where_it_is_no_fault_of_the_request(reply: Reply, status: int):
    """A key that is refused there is not the client's."""
    async with web_on(ScriptedServer([reply])) as web, web.client() as client:
        answer = await client.post(CHATS, json=CHAT)

    assert status == answer.status_code


async def test_nothing_in_a_request_can_choose_the_server():
    """An address in the place of a name is a model that there is not."""
    server = ScriptedServer([HELLO])
    async with web_on(server) as web, web.client() as client:
        reply = await client.post(CHATS, json=CHAT | {"model": "http://127.0.0.1:9/v1"})

    assert (404, []) == (reply.status_code, server.received)
