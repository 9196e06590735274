"""Requests over raw sockets that no HTTP library would send: each gets its status, and the server serves the next."""

import asyncio
import gc
import json
import random
import re
from contextlib import AsyncExitStack

import httpx
import pytest

from app.web.http.private_api import served_methods
from app.web.http.protocol import MAX_PIPELINED, GuardedProtocol
from tests.waiting import HANG_SECONDS, until
from tests.web.harness import AUTH, KEY, ScriptedService, Web, make_web
from tests.web.raw_requests import BODY, CASES, CHUNKED, INNER, TRAILED, Case, get, post
from tests.web.raw_sockets import RawClient, exchange, statuses

DEADLINE_SECONDS = 0.4
"""For heads and bodies in these tests."""
SHORT = {"head_timeout_seconds": DEADLINE_SECONDS, "body_timeout_seconds": DEADLINE_SECONDS}


async def judge(web: Web, port: int, case: Case, packets: list[bytes]) -> None:
    before = len(web.service.requests)
    async with asyncio.timeout(HANG_SECONDS):
        client, usable = await exchange(port, packets, len(case.statuses), closes=case.closes)

    assert (case.statuses, case.closes) == (statuses(client.answer), not usable)
    assert case.may_reset or not client.reset
    assert case.reaches == len(web.service.requests) - before


async def serves(port: int) -> bool:
    """Return whether a client that connects now is served."""
    async with asyncio.timeout(HANG_SECONDS):
        client, _ = await exchange(port, [INNER], 1, closes=False)
    return statuses(client.answer) == (200,)


async def test_the_table_is_as_long_as_it_should_be():
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)


async def test_every_shape_of_request_gets_its_answer(subtests, log_lines):
    web = await make_web(security=SHORT)
    async with web.listening(timeout_keep_alive=2 * HANG_SECONDS) as port:
        for case in CASES:
            with subtests.test(case.name):
                await judge(web, port, case, [case.sent])
        assert await serves(port)
    assert not [line for line in log_lines if line["log_level"] in ("error", "critical")]


@pytest.mark.parametrize("seed", [1, *[pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(2, 22)]])
async def test_it_gets_the_same_however_its_bytes_are_cut_into_packets(subtests, seed):
    chance = random.Random(seed)
    web = await make_web(security={"head_timeout_seconds": 5, "body_timeout_seconds": 5})
    async with web.listening(timeout_keep_alive=2 * HANG_SECONDS) as port:
        for case in CASES:
            if len(case.sent) > 10_000:
                continue
            with subtests.test(case.name):
                cuts = sorted(chance.choices(range(len(case.sent) + 1), k=min(12, len(case.sent))))
                ends = [*cuts, len(case.sent)]
                packets = [case.sent[start:end] for start, end in zip([0, *cuts], ends, strict=True) if end > start]
                await judge(web, port, case, packets)
        assert await serves(port)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)])])
async def test_no_mutation_of_a_request_breaks_the_server_or_hangs(count, log_lines):
    """Bytes changed, removed, doubled: any status but 5xx (505 aside), and an end within the deadlines."""
    chance = random.Random(7)
    seeds = [case.sent for case in CASES if len(case.sent) < 2000]
    web = await make_web(security=SHORT)

    def mutated() -> bytes:
        sent = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(sent) + 1)
            match chance.randrange(4):
                case 0:
                    sent[at:at] = chance.choice([b"\r\n", b"\n", b"\0", b":", b" ", b"0", b"\xff", b"chunked", b","])
                case 1:
                    del sent[at : at + chance.randint(1, 8)]
                case 2:
                    sent[at : at + 1] = bytes([chance.randrange(256)])
                case _:
                    sent[at:at] = sent[at : at + chance.randint(1, 40)]
        return bytes(sent)

    async def send(sent: bytes) -> None:
        async with RawClient(port) as client, asyncio.timeout(HANG_SECONDS):
            await client.send([sent])
            await client.read_to_end()
        wrong = {status for status in statuses(client.answer) if status >= 500} - {505}
        assert not wrong, sent

    async with web.listening() as port:
        at_once = min(400, count)
        for _ in range(0, count, at_once):
            await asyncio.gather(*(send(mutated()) for _ in range(at_once)))
        assert await serves(port)
    assert not [line for line in log_lines if line["log_level"] in ("error", "critical")]


@pytest.mark.parametrize("name", ["X-API-Key", "Authorization"])
async def test_a_key_in_a_trailer_is_none(name):
    """Who asks is decided by the head: what follows the body never becomes a header."""
    web = await make_web()
    value = KEY if name == "X-API-Key" else f"Bearer {KEY}"
    head = (
        b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    async with web.listening() as port:
        client, _ = await exchange(port, [head + CHUNKED + f"{name}: {value}\r\n\r\n".encode()], 1, closes=True)

    assert (401,) == statuses(client.answer)
    assert [] == web.service.requests


async def test_a_trailer_names_no_request_id(log_lines):
    web = await make_web()
    async with web.listening() as port:
        client, _ = await exchange(port, [TRAILED + CHUNKED + b"X-Request-ID: trailer\r\n\r\n"], 1, closes=False)

    assert re.search(rb"x-request-id: [0-9a-f-]{36}", client.answer)
    assert "trailer" not in str(log_lines)


FRAMINGS = {
    "length": ("Content-Length: 100000",),
    "length with leading zeros": ("Content-Length: 00000000000000000000000000100000",),
    "chunked": ("Transfer-Encoding: chunked",),
}


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_a_body_has_one_deadline_whatever_announces_it(framing):
    """A byte now and then does not extend it."""
    web = await make_web(security=SHORT)
    async with web.listening() as port, RawClient(port) as client:
        began = asyncio.get_running_loop().time()
        await client.send([post(*FRAMINGS[framing], body=b"")])

        async def drip() -> None:
            while True:
                await client.send([b"1\r\n \r\n" if framing == "chunked" else b" "])
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(HANG_SECONDS):
            await client.read_responses(1)
        took = asyncio.get_running_loop().time() - began
        dripping.cancel()

    assert (408,) == statuses(client.answer)
    assert DEADLINE_SECONDS * 0.9 < took


@pytest.mark.parametrize("framing", FRAMINGS)
async def test_the_bytes_of_a_body_are_counted_whatever_announces_them(framing):
    """And the client can read the refusal, although it goes on sending."""
    web = await make_web(security={"max_body_bytes": 5000})
    async with web.listening() as port:
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n" if framing == "chunked" else b" " * 4096
        packets = [post(*FRAMINGS[framing], body=b""), *[chunk] * 24]
        async with asyncio.timeout(HANG_SECONDS):
            client, _ = await exchange(port, packets, 1, closes=True)

    assert ((413,), False) == (statuses(client.answer), client.reset)
    assert [] == web.service.requests


FRAMING_WITHOUT_END = {"trailer": b"0\r\nX-Any: ", "extension of a chunk": b"1;", "zeros of a size": b"0"}


@pytest.mark.parametrize("begun", FRAMING_WITHOUT_END)
async def test_what_frames_a_chunked_body_has_no_more_bytes_than_a_head(begun):
    """The parser collects a trailer before it says that there is one."""
    web = await make_web()
    async with web.listening() as port:
        packets = [TRAILED + b"1\r\n{\r\n" + FRAMING_WITHOUT_END[begun], *[b"0" * 16_384] * 64]
        async with asyncio.timeout(HANG_SECONDS):
            client, _ = await exchange(port, packets, 1, closes=True)

    assert statuses(client.answer) in ((431,), (400,))
    assert [] == web.service.requests


async def test_many_small_chunks_are_a_body_as_any_other():
    """Their framing is many times as long as they are, and as long as a head may be in sum."""
    web = await make_web()
    body = json.dumps({"prompt": "hello " * 600, "max_tokens": 5}).encode() + b" " * 12_000
    packets = [b"".join(b"1\r\n%c\r\n" % byte for byte in body[at : at + 100]) for at in range(0, len(body), 100)]
    async with web.listening() as port:
        client, _ = await exchange(port, [TRAILED, *packets, b"0\r\n\r\n"], 1, closes=False)

    assert (200,) == statuses(client.answer)


async def test_a_head_that_came_in_part_with_the_request_before_has_its_time():
    """The connection is not idle, and is not closed as if it were."""
    web = await make_web()
    async with web.listening(timeout_keep_alive=0.1) as port, RawClient(port) as client:
        await client.send([INNER + INNER[:-4]])
        await client.read_responses(1)
        await asyncio.sleep(0.5)
        await client.send([INNER[-4:]])
        async with asyncio.timeout(HANG_SECONDS):
            await client.read_responses(2)

    assert (200, 200) == statuses(client.answer)


async def test_a_server_that_stops_ends_a_response_that_something_wrong_follows(log_lines):
    service = ScriptedService(steps=["a", 0.5, "b"])
    web = await make_web(service)
    async with AsyncExitStack() as stack:
        async with web.listening() as port:
            client = await stack.enter_async_context(RawClient(port))
            await client.send([post(f"Content-Length: {len(BODY)}") + b"\0\r\n\r\n"])
            await until(lambda: service.running == 1)
            reading = asyncio.create_task(client.read_to_end())
        await reading

    assert (200,) == statuses(client.answer)
    assert not [line for line in log_lines if line["log_level"] in ("error", "critical")]


async def drip(client: RawClient, data: bytes) -> None:
    """Send this again and again, and read until the server closes the connection."""

    async def send() -> None:
        for _ in range(1000):
            await client.send([data])
            await asyncio.sleep(0.05)

    sending = asyncio.create_task(send())
    async with asyncio.timeout(HANG_SECONDS):
        await client.read_to_end()
    sending.cancel()


@pytest.mark.parametrize("sent", [b"GET /health", INNER[:-2], INNER + INNER[:-4]], ids=["line", "headers", "second"])
async def test_a_head_that_does_not_end_is_given_up(sent):
    web = await make_web(security=SHORT)
    async with web.listening() as port, RawClient(port) as client:
        await client.send([sent])
        await drip(client, b"a")
        body = json.loads(client.answer.rpartition(b"\r\n\r\n")[2])

    assert 408 == statuses(client.answer)[-1]
    assert "deadline_exceeded" == body["error"]


async def test_a_connection_that_sends_nothing_is_closed_without_a_word():
    web = await make_web(security=SHORT)
    async with web.listening() as port, RawClient(port) as client:
        async with asyncio.timeout(HANG_SECONDS):
            await client.read_to_end()

    assert (b"", False) == (client.answer, client.reset)


async def test_empty_lines_do_not_keep_an_idle_connection():
    """A client may send some before a request, and the server waits for that no longer than for any other head."""
    web = await make_web(security=SHORT)
    async with web.listening() as port, RawClient(port) as client:
        await client.send([INNER])
        await client.read_responses(1)
        await drip(client, b"\r\n")

    assert (200,) == statuses(client.answer)


async def test_a_client_that_closes_its_side_frees_its_place_and_its_generation():
    web = await make_web()
    web.service.steps = ["a", 60.0]
    body = b'{"prompt": "hello", "stream": true}'
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(f"Content-Length: {len(body)}", body=body))
        await reader.readuntil(b": keep-alive\n\n")
        writer.write_eof()
        async with asyncio.timeout(HANG_SECONDS):
            await reader.read()
            while web.service.running:  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.01)
        writer.close()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("requests", [1, 2])
async def test_a_client_that_ends_what_it_sends_with_its_request_is_answered(stream, requests):
    """As `nc -N` does; then the connection is closed, and nothing of it is left."""
    web = await make_web(security={"half_close_seconds": 3})
    web.service.steps = ["a", 0.3, "b"]
    body = json.dumps({"prompt": "hello", "stream": stream}).encode()
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(f"Content-Length: {len(body)}", body=body) * requests)
        writer.write_eof()
        async with asyncio.timeout(HANG_SECONDS):
            answer = await reader.read()
        writer.close()

    assert requests == answer.count(b"HTTP/1.1 200 OK")
    assert requests == answer.count(b"event: done" if stream else b'"generated_text":"ab"')
    assert 0 == web.service.running


async def test_a_client_that_ends_its_side_in_the_middle_of_a_request_is_not():
    """Nobody can know what it wanted."""
    web = await make_web()
    async with web.listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("Content-Length: 99", body=b"{"))
        writer.write_eof()
        async with asyncio.timeout(HANG_SECONDS):
            answer = await reader.read()
        writer.close()

    assert b"" == answer
    assert [] == web.service.requests


async def test_nothing_of_a_closed_connection_waits_for_the_garbage_collector():
    """A cycle of references for each would pause all streams while they are collected."""
    web = await make_web()
    async with web.listening() as port:
        await exchange(port, [INNER], 1, closes=False)
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await exchange(port, [INNER], 1, closes=False)
            await asyncio.sleep(0.05)
            found = [each for each in gc.get_objects() if type(each) is GuardedProtocol]
        finally:
            gc.enable()

    assert [] == found


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_http_1_0_gets_no_chunks(stream):
    """It does not know them; a stream ends with the connection, and what has a length keeps it."""
    web = await make_web()
    body = json.dumps({"prompt": "hello", "stream": stream}).encode()
    async with web.listening() as port, RawClient(port) as client:
        await client.send([post(f"Content-Length: {len(body)}", body=body, version="HTTP/1.0")])
        async with asyncio.timeout(HANG_SECONDS):
            await client.read_to_end()

    head, _, content = client.answer.partition(b"\r\n\r\n")
    assert (200,) == statuses(head)
    assert b"chunked" not in head.lower()
    assert [b"connection: close"] == [line for line in head.lower().split(b"\r\n") if line.startswith(b"connection")]
    assert stream is (b"content-length" not in head.lower())
    if stream:
        assert content.startswith(b": keep-alive\n\n")
        assert content.rstrip().splitlines()[-1].startswith(b"data: ")
    else:
        assert "Hello" == json.loads(content)["generated_text"]


async def test_what_the_parser_refuses_has_the_envelope_and_echoes_nothing():
    web = await make_web()
    async with web.listening() as port:
        client, _ = await exchange(port, [get("canary7391 : a")], 1, closes=True)

    head, _, body = client.answer.partition(b"\r\n\r\n")
    assert {"error", "message", "details", "timestamp", "request_id"} == set(json.loads(body))
    assert b"connection: close" in head
    assert b"canary" not in client.answer


QUEUED = {
    "request": INNER,
    "part of a request": INNER[:-2],
    "request with a body": post(f"Content-Length: {len(BODY)}"),
    "more than may wait": INNER * (MAX_PIPELINED + 2),
    "garbage": b"\0\r\n\r\n",
}


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("queued", QUEUED)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_hang_up_cancels_a_generation_with_another_request_queued_behind_it(queued, stream, later):
    web = await make_web(ScriptedService(steps=["a", 60.0]))
    body = json.dumps({"prompt": "hello", "stream": stream}).encode()
    request = post(f"Content-Length: {len(body)}", body=body)
    async with web.listening() as port:
        async with RawClient(port) as client:
            if later:
                await client.send([request])
                await until(lambda: web.service.running == 1)
                await asyncio.sleep(0.1)  # the server watches for a hang-up now
                await client.send([QUEUED[queued]])
                await asyncio.sleep(0.1)
            else:
                await client.send([request + QUEUED[queued]])
                await until(lambda: web.service.running == 1)
        await until(lambda: web.service.running == 0)


async def test_head_is_answered_as_get_without_a_body_and_other_methods_are_refused_sanely(subtests):
    """On every path, over one connection: a body that is sent all the same would garble the next response."""
    web = await make_web(security={"docs": True, "failed_keys_per_minute": 10_000})
    paths = [*sorted(served_methods(web.app)), "/v1/sessions/none", "/v1/models/scripted", "/v1/keys/none", "/nowhere"]
    async with web.listening() as port:
        for headers in (AUTH, {}):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
                for path in paths:
                    with subtests.test(f"{path} {headers}"):
                        get = await client.get(path)
                        head = await client.head(path)
                        others = [await client.request(method, path) for method in ("OPTIONS", "TRACE")]

                        assert get.status_code == head.status_code
                        assert b"" == head.content
                        assert get.headers["content-type"] == head.headers["content-type"]
                        assert get.status_code != 200 or head.headers["content-length"]
                        assert {401, 404, 405} >= {each.status_code for each in others}
