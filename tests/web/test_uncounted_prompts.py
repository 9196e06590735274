"""Prompts that surely fit go to another server without being counted; whatever depends on their length stays exact."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from app.access.limits import configured
from app.types import Principal, Tenant
from tests.unit.engine.remote.scripted_server import (
    CARD,
    DONE,
    FOREVER,
    Reply,
    ScriptedServer,
    chunk,
    engine_on,
    event,
)
from tests.waiting import HANG_SECONDS, until
from tests.web.harness import CHAT, Web, make_web

CHATS = "/v1/chat/completions"
COUNT = 11
"""What the server's route /tokenize says; its streams say 7, so it shows which of them was taken."""


def counted(prompt: int, completion: int, text: str | None = None, **fields: Any) -> bytes:
    """Return a chunk that tells the usage so far, as vLLM's do on request."""
    delta = {} if text is None else {"content": text}
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [{"index": 0, "delta": delta, **fields}], "usage": tokens})


ANSWER = Reply(
    [counted(7, 0, ""), counted(7, 1, "Hel"), counted(7, 2, "lo"), counted(7, 2, finish_reason="stop"), DONE]
)


def make_server(*replies: Reply, length: int = 8192) -> ScriptedServer:
    models = Reply.json({"data": [CARD | {"owned_by": "vllm", "max_model_len": length}]})
    tokenize = Reply.json({"count": COUNT, "max_model_len": length, "tokens": [1] * COUNT})
    return ScriptedServer(list(replies or [ANSWER]), models=models, others={"/tokenize": tokenize})


@asynccontextmanager
async def web_on(server: ScriptedServer, **settings: Any) -> AsyncIterator[Web]:
    async with engine_on(server) as engine:
        server.requests.clear()
        yield await make_web(engines={"m": engine}, **({"rate_limit": {"enabled": False}} | settings))


async def test_a_prompt_that_surely_fits_is_not_counted_first():
    """Usage, context, metrics and the log have the server's count."""
    server = make_server()
    async with web_on(server) as web, web.client() as client:
        reply = (await client.post("/v1/chat", json={**CHAT, "session_id": "s"})).json()
        again = (await client.post("/v1/chat", json={**CHAT, "session_id": "s"})).json()
        metrics = (await client.get("/metrics")).text

    assert 0 == server.requests["/tokenize"]
    assert (7, 2, 7) == (
        reply["usage"]["prompt_tokens"],
        reply["usage"]["completion_tokens"],
        reply["context"]["prompt_tokens"],
    )
    assert (1, False) == (again["context"]["turns_kept"], "estimated" in again["context"])
    assert 'prompt_tokens_total{model="m"} 14.0' in metrics


async def test_a_prompt_that_may_not_fit_is_counted_first():
    """With its completion: one that leaves less than was asked for is refused by the exact count."""
    server = make_server(length=2200)
    async with web_on(server) as web, web.client() as client:
        fits = await client.post(CHATS, json=CHAT | {"max_tokens": 2200 - COUNT})
        counted_once = server.requests["/tokenize"]
        refused = await client.post(CHATS, json=CHAT | {"max_tokens": 2201 - COUNT})

    assert (200, 1, 400) == (fits.status_code, counted_once, refused.status_code)
    assert "context_length_exceeded" == refused.json()["error"]["code"]
    assert 1 == len(server.received)


async def test_whoever_is_told_the_length_in_the_first_chunk_is_told_the_exact_one():
    server = make_server()
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    async with web_on(server) as web, web.client() as client:
        reply = await client.post(CHATS, json=body)

    first = json.loads(next(line for line in reply.text.split("\n") if line.startswith("data: "))[6:])
    assert COUNT == first["usage"]["prompt_tokens"]
    assert 1 == server.requests["/tokenize"]


async def test_a_prompt_whose_length_the_server_does_not_tell_is_counted_with_its_first_token():
    """So that whoever hangs up later pays for it."""
    whole = Reply([chunk("Hello"), chunk(finish_reason="stop"), DONE])
    server = make_server(whole, Reply([chunk("Hello "), FOREVER]))
    async with web_on(server) as web, web.client() as client:
        reply = (await client.post(CHATS, json=CHAT)).json()
        waiting = asyncio.create_task(client.post(CHATS, json=CHAT))
        await until(lambda: server.requests["/tokenize"] == 2)
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait([waiting])
        metrics = (await client.get("/metrics")).text

    assert COUNT == reply["usage"]["prompt_tokens"]
    assert f'prompt_tokens_total{{model="m"}} {2 * COUNT}.0' in metrics


async def test_a_repeated_response_has_the_length_of_its_prompt():
    server = make_server()
    async with web_on(server) as web, web.client() as client:
        replies = [await client.post(CHATS, json=CHAT | {"temperature": 0}) for _ in range(2)]

    assert ["MISS", "HIT"] == [reply.headers["x-cache"] for reply in replies]
    assert [7, 7] == [reply.json()["usage"]["prompt_tokens"] for reply in replies]


async def test_who_hangs_up_pays_for_the_prompt_as_the_server_counted_it():
    """And until then holds no more of its limit a minute than its request can take."""
    server = make_server(Reply([counted(7, 0, ""), counted(7, 1, "Hello "), FOREVER]))
    limits = {"requests_per_minute": 1000, "burst_size": 1000, "tokens_per_minute": 10_000}
    async with web_on(server, rate_limit=limits) as web, asyncio.timeout(HANG_SECONDS):
        async with web.client() as client:
            waiting = asyncio.create_task(client.post(CHATS, json=CHAT | {"max_tokens": 100}))
            await until(lambda: server.live > 0)
            await asyncio.sleep(0.1)
            meanwhile = await tokens_left(web)
            waiting.cancel()
            await asyncio.wait([waiting])
        async with web.client() as client:
            metrics = (await client.get("/metrics")).text

    assert 10_000 - 107 <= meanwhile < 10_000
    assert 'prompt_tokens_total{model="m"} 7.0' in metrics


async def test_a_limit_a_minute_refuses_nobody_for_tokens_that_no_prompt_has():
    """Where the bound is not left, the prompt is counted, and the request refused by that alone."""
    server = make_server()
    limits = {"requests_per_minute": 1000, "burst_size": 1000, "tokens_per_minute": COUNT + 20}
    async with web_on(server, rate_limit=limits) as web, web.client() as client:
        refused = await client.post(CHATS, json=CHAT | {"max_tokens": 21})
        reply = await client.post(CHATS, json=CHAT | {"max_tokens": 20})

    assert (429, 200) == (refused.status_code, reply.status_code)
    assert 2 == server.requests["/tokenize"]


async def tokens_left(web: Web) -> int:
    """Return how many tokens the key has left; it gains 167 a second."""
    limits = configured(web.container.settings.rate_limit, web.container.settings.quota)
    states = await web.container.admission.limits(Principal("admin", Tenant.configured(), limits=limits))
    return next(each.remaining for each in states if each.kind == "tokens")
