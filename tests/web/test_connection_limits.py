"""Who keeps a connection when there are too many, over real sockets: slow and silent ones never lock others out."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.waiting import HANG_SECONDS, until
from tests.web.harness import ScriptedService, Web, make_web
from tests.web.raw_requests import BODY, INNER, post
from tests.web.raw_sockets import RawClient, exchange, statuses

REQUEST = post(f"Content-Length: {len(BODY)}")
SLOW = {
    "silent": b"",
    "half a head": b"POST /v1/generate HTTP/1.1\r\nHost: x\r\n",
    "idle after a public page": INNER,
    "half a body": REQUEST[:-5],
}


@asynccontextmanager
async def opened(port: int, count: int, sent: bytes) -> AsyncIterator[list[RawClient]]:
    """Open connections, one after the other, that send no more than this."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(await stack.enter_async_context(RawClient(port)))
            await clients[-1].send([sent] if sent else [])
        yield clients


async def metric(web: Web, port: int, name: str) -> float:
    client, _ = await exchange(port, [b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"], 1, closes=True)
    lines = client.answer.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("kind", SLOW)
async def test_however_many_are_slow_every_other_client_is_served(kind):
    """Sixty that send little or nothing, with places for twenty."""
    web = await make_web(security={"max_connections": 20})
    async with web.listening(timeout_keep_alive=2 * HANG_SECONDS) as port, RawClient(port) as known:
        await known.send([REQUEST])
        await known.read_responses(1)
        async with opened(port, 60, SLOW[kind]):
            for _ in range(5):
                client, usable = await exchange(port, [REQUEST], 1, closes=False)
                assert ((200,), True) == (statuses(client.answer), usable)
            await known.send([REQUEST])
            async with asyncio.timeout(HANG_SECONDS):
                await known.read_responses(2)
            assert await metric(web, port, "connections_open") <= 20
            assert await metric(web, port, 'connections_closed_total{reason="evicted"}') >= 40

    assert (200, 200) == statuses(known.answer)


@pytest.mark.parametrize(
    ("limits", "status"), [({"max_connections": 3}, 503), ({"max_connections_per_address": 3}, 429)], ids=["all", "one"]
)
async def test_when_all_are_being_served_a_new_one_is_told_when_to_come_back(limits, status):
    web = await make_web(ScriptedService(steps=["a", 60.0]), security=limits)
    async with web.listening() as port, opened(port, 3, REQUEST):
        await until(lambda: web.service.running == 3)
        async with asyncio.timeout(HANG_SECONDS):
            client, _ = await exchange(port, [REQUEST], 1, closes=True)
        running = web.service.running

    head, _, body = client.answer.partition(b"\r\n\r\n")
    assert ((status,), False) == (statuses(client.answer), client.reset)
    assert b"retry-after: " in head
    assert {"error", "message", "details", "timestamp", "request_id"} == set(json.loads(body))
    assert (3, 3) == (running, len(web.service.requests))


async def test_a_trusted_proxy_has_no_limit_of_its_own():
    """All clients behind it come from its address."""
    web = await make_web(
        ScriptedService(steps=["a", 60.0]),
        security={"max_connections_per_address": 2},
        app={"trusted_proxies": ("127.0.0.1",)},
    )
    async with web.listening() as port, opened(port, 8, REQUEST):
        await until(lambda: web.service.running == 8)


async def test_a_place_is_free_again_when_its_connection_is_gone():
    web = await make_web(ScriptedService(steps=["a", 60.0]), security={"max_connections": 2})
    async with web.listening() as port:
        for _ in range(5):
            async with opened(port, 2, REQUEST):
                await until(lambda: web.service.running == 2)
            await until(lambda: web.service.running == 0)
    assert 10 == len(web.service.requests)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_does_not_read_is_cut_off_and_frees_what_it_holds(stream, monkeypatch):
    """It neither keeps its generation running nor its response in memory."""
    monkeypatch.setattr("app.web.http.connections.WRITE_SECONDS", 0.5)
    service = ScriptedService(steps=["a" * 100_000] * (1000 if stream else 200))
    web = await make_web(service)
    body = json.dumps({"prompt": "hello", "stream": stream}).encode()
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(post(f"Content-Length: {len(body)}", body=body))
        await until(lambda: bool(service.requests))
        await until(lambda: service.running == 0)
        async with asyncio.timeout(HANG_SECONDS):
            while await metric(web, port, "connections_open") > 1:  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.1)
        assert 1 == await metric(web, port, 'connections_closed_total{reason="slow_reader"}')
        writer.transport.abort()
        del reader
