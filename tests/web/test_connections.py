"""What only a real socket shows: hang-ups, slow and broken clients, streams as they come.  All middlewares are on."""

import asyncio
import json
import time
from typing import Any

import pytest

from app.generation.batch import MAX_PARALLEL
from app.types import FinishReason
from tests.waiting import HANG_SECONDS, until
from tests.web.harness import BODIES, CHAT, KEY, ScriptedService, make_web

CANCEL_SECONDS = 10
"""Far less than the minute for which the engine says nothing, on a busy machine too."""
"""A hang-up must reach the generator in this time."""


def post(path: str, fields: dict[str, Any], *headers: str) -> bytes:
    content = json.dumps(fields).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: test",
        f"X-API-Key: {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


async def talk(port: int, sent: bytes, seconds: float = HANG_SECONDS) -> bytes:
    """Send bytes and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(seconds):
        answer = await reader.read()
    writer.close()
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("steps", [["a", 60.0], [60.0]], ids=["mid-answer", "before the first token"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_hangs_up_cancels_its_answer_at_once(path, steps, stream, log_lines):
    """The generator does not wait for its next token, and an answer never begun is logged as 499."""
    web = await make_web(ScriptedService(steps=steps))
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(path, {**BODIES[path], "stream": stream}))
        await (reader.readuntil(b": keep-alive\n\n") if stream else until(lambda: web.service.running == 1))
        await asyncio.sleep(0.05)
        hung_up = asyncio.get_running_loop().time()
        writer.close()
        await until(lambda: web.service.running == 0)
        await until(lambda: bool(log_lines))

    assert web.service.closed_at - hung_up < CANCEL_SECONDS
    assert (path, 200 if stream else 499) == (log_lines[0]["route"], log_lines[0]["status_code"])
    assert 1 == len(log_lines)


async def test_a_client_that_hangs_up_while_it_waits_for_a_place_is_forgotten(log_lines):
    """A stream that has not begun, because the engine has not taken it yet, is cancelled too."""
    web = await make_web(ScriptedService(refusal_after_seconds=60))
    async with web.listening() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/chat", {**CHAT, "stream": True}))
        await until(lambda: web.service.running == 1)
        hung_up = asyncio.get_running_loop().time()
        writer.close()
        await until(lambda: web.service.running == 0)
        await until(lambda: bool(log_lines))

    assert web.service.closed_at - hung_up < CANCEL_SECONDS
    assert 499 == log_lines[0]["status_code"]


async def test_a_client_that_hangs_up_cancels_its_whole_batch(log_lines):
    """Every answer in the making, and those that have not begun."""
    web = await make_web(ScriptedService(steps=["a", 60.0]))
    async with web.listening() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/generate/batch", {"prompts": ["x"] * 40}))
        await until(lambda: web.service.running == MAX_PARALLEL)
        hung_up = asyncio.get_running_loop().time()
        writer.close()
        await until(lambda: web.service.running == 0)
        await until(lambda: bool(log_lines))

    assert web.service.closed_at - hung_up < CANCEL_SECONDS
    assert MAX_PARALLEL == len(web.service.requests)
    assert ("/v1/generate/batch", 499) == (log_lines[0]["route"], log_lines[0]["status_code"])


async def test_many_hang_ups_leave_nothing_behind():
    """Forty clients at forty moments: no generator and no task is left."""
    web = await make_web(ScriptedService(steps=["a", 0.01] * 500))
    async with web.listening() as port:
        await talk(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        before = len(asyncio.all_tasks())

        async def visit(number: int) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post("/v1/generate", {"prompt": "a", "stream": number % 2 == 0}))
            await asyncio.sleep(number * 0.005)
            writer.transport.abort()

        await asyncio.gather(*(visit(number) for number in range(40)))
        await until(lambda: web.service.running == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_stream_begins_before_the_first_token_and_sends_each_delta_at_once():
    first, second = asyncio.Event(), asyncio.Event()
    web = await make_web(ScriptedService(steps=[first, "a", second, "b"]))
    async with web.listening() as port, asyncio.timeout(HANG_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/generate", {"prompt": "x", "stream": True}, "Connection: close"))
        begin = await reader.readuntil(b": keep-alive\n\n")
        first.set()
        await reader.readuntil(b'"a"}\n\n')
        second.set()
        await reader.readuntil(b'"b"}\n\n')
        rest = await reader.read()
        writer.close()

    assert b'"a"}' not in begin
    assert b"event: done" in rest


async def test_a_refused_stream_is_an_ordinary_429_with_its_headers():
    web = await make_web(rate_limit={"requests_per_minute": 1, "burst_size": 1})
    async with web.listening() as port:
        first = await talk(port, post("/v1/chat", {**CHAT, "stream": True}, "Connection: close"))
        second = await talk(port, post("/v1/chat", {**CHAT, "stream": True}, "Connection: close"))

    assert (200, 429) == (status_of(first), status_of(second))
    assert b"x-ratelimit-remaining-requests: 0\r\n" in first
    assert b"event: done" in first
    for header in (b"retry-after: ", b"x-ratelimit-limit-requests: 1\r\n", b"x-ratelimit-reset-requests: 1m0s\r\n"):
        assert header in second


async def test_a_shutdown_lets_streams_end_with_their_last_event():
    """Stopping the server cuts no stream: what ends it is the engine's own last event."""
    service = ScriptedService(steps=["a", 0.6], finish_reason=FinishReason.ABORT)
    web = await make_web(service)
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/chat", {**CHAT, "stream": True}))
        await reader.readuntil(b": keep-alive\n\n")
    answer = await reader.read()
    writer.close()

    assert b'"finish_reason":"abort"' in answer
    assert answer.endswith(b"0\r\n\r\n")


async def test_a_body_that_comes_too_slowly_is_given_up():
    """One byte at a time: 408 after the time that is allowed, and the connection is closed."""
    web = await make_web(security={"body_timeout_seconds": 0.3})
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head, _, _ = post("/v1/generate", {"prompt": "x" * 100}).partition(b"\r\n\r\n")
        began = time.monotonic()
        writer.write(head + b"\r\n\r\n")

        async def drip() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(HANG_SECONDS):
            answer = await reader.read()
        dripping.cancel()
        writer.close()

    assert (408, "deadline_exceeded") == (status_of(answer), json.loads(answer.split(b"\r\n\r\n")[1])["error"])
    assert time.monotonic() - began > 0.25
    assert b"connection: close" in answer.lower()
    assert [] == web.service.requests


async def test_the_deadline_is_for_the_body_and_not_for_the_answer():
    web = await make_web(ScriptedService(steps=[0.5, "late"]), security={"body_timeout_seconds": 0.2})
    async with web.listening() as port:
        for stream in (True, False):
            answer = await talk(port, post("/v1/chat", {**CHAT, "stream": stream}, "Connection: close"))
            assert 200 == status_of(answer)
            assert b"late" in answer


async def test_a_client_that_goes_with_half_its_body_sent_is_forgotten(log_lines):
    web = await make_web()
    async with web.listening() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/generate", {"prompt": "half"})[:-5])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: bool(log_lines))

    assert [("/v1/generate", 499)] == [(line["route"], line["status_code"]) for line in log_lines]
    assert [] == web.service.requests


async def test_a_long_body_is_refused_without_being_read():
    web = await make_web(security={"max_body_bytes": 1000})
    async with web.listening() as port:
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
        announced = await talk(port, f"{head}Content-Length: 1000000000\r\n\r\n".encode())
        chunk = b"3e8\r\n" + b"a" * 1000 + b"\r\n"
        chunked = await talk(port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 3)

    assert (413, 413) == (status_of(announced), status_of(chunked))


@pytest.mark.parametrize(
    ("lines", "statuses"),
    [
        (["Host: x/health?"], {400}),
        (["Host: /health"], {400}),
        (["Host: test\r\nHost: other"], {400, 401}),
        ([f"X-API-Key: {KEY}", f"X-API-Key: {KEY}"], {401}),
        ([f"X-API-Key: {KEY}", "X-API-Key: other"], {401}),
        (["X-API-Key: k\xe9y"], {401}),
        (["X-API-Key: " + "k" * 8192], {401}),
        (["X-API-Key: a\x00b"], {400, 401}),
        ([f"X-API-Key: {KEY}", "Transfer-Encoding: chunked", "Content-Length: 5"], {400}),
        ([f"X-API-Key: {KEY}", "Transfer-Encoding: gzip"], {400}),
        ([f"X-API-Key: {KEY}", "Content-Length: -1"], {400}),
        ([f"X-API-Key: {KEY}", "Content-Length: abc"], {400}),
        ([f"X-API-Key: {KEY}", "Content-Length: 5", "Content-Length: 6"], {400}),
        ([f"X-API-Key: {KEY}", "Content-Type: application/json", "Content-Length: 0"], {400}),
    ],
)
async def test_broken_requests_are_refused_and_never_fail(lines, statuses):
    web = await make_web()
    async with web.listening() as port:
        head = ["POST /v1/generate HTTP/1.1", *([] if "Host" in lines[0] else ["Host: x"]), "Connection: close", *lines]
        answer = await talk(port, "\r\n".join(head).encode("latin-1") + b"\r\n\r\n")

    assert status_of(answer) in statuses
    assert [] == web.service.requests


async def test_an_unread_body_does_not_become_the_next_request():
    """A refused request's body that looks like a request is not answered as one."""
    web = await make_web()
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    async with web.listening() as port:
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
        answer = await talk(port, head + inner)

    assert 401 == status_of(answer)
    assert 1 == answer.count(b"HTTP/1.1 ")


async def test_one_connection_serves_one_request_after_the_other():
    web = await make_web()
    async with web.listening() as port:
        once = post("/v1/chat", {**CHAT, "stream": True})
        answer = await talk(port, once + post("/v1/chat", CHAT) + post("/v1/chat", CHAT, "Connection: close"))

    assert 3 == answer.count(b"HTTP/1.1 200 OK")
    assert 1 == answer.count(b"event: done")
