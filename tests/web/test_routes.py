"""What each route answers when all is well, field by field."""

import asyncio
import json
import re
import time

import httpx
import pytest

from app.engine.echo import EchoEngine
from app.errors import ContextLengthExceeded, EngineBusy, InternalError
from app.generation.sessions import Turn
from app.types import Message, Role, SamplingParams, Tenant
from app.web.http.json_body import GeneratingRoute
from tests.waiting import HANG_SECONDS
from tests.web.harness import (
    AUTH,
    BODIES,
    CHAT,
    GENERATE,
    MODEL,
    OPENAI_BODIES,
    ScriptedService,
    Step,
    frames,
    is_envelope,
    make_web,
)

STREAMING = {**BODIES, **OPENAI_BODIES}

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


async def test_routes_that_generate_are_tried_before_all_others():
    """A request is compared with one route after the other, and theirs is the one that counts."""
    generates = [isinstance(route, GeneratingRoute) for route in (await make_web()).app.routes]

    assert generates[0]
    assert sorted(generates, reverse=True) == generates


async def test_generate_answers_with_the_documented_fields(client):
    reply = await client.post("/v1/generate", json=GENERATE)

    assert 200 == reply.status_code
    assert {
        "generated_text": "Hello",
        "prompt": "hello",
        "output": "Hello",
        "model": MODEL,
        "tokens_generated": 2,
        "cached": False,
        "finish_reason": "stop",
        "completions": [{"text": "Hello", "finish_reason": "stop"}],
        "usage": USAGE,
        "request_id": reply.headers["x-request-id"],
    } == reply.json()


async def test_chat_answers_with_the_documented_fields(client):
    reply = await client.post("/v1/chat", json={**CHAT, "session_id": "s-1"})

    assert 200 == reply.status_code
    assert {
        "message": {"role": "assistant", "content": "Hello"},
        "model": MODEL,
        "tokens_generated": 2,
        "cached": False,
        "session_id": "s-1",
        "finish_reason": "stop",
        "usage": USAGE,
        "context": {"limit": 100, "prompt_tokens": 3, "turns_kept": 1, "turns_dropped": 0},
        "request_id": reply.headers["x-request-id"],
    } == reply.json()


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_has_its_deltas_and_one_done_frame(client, path):
    reply = await client.post(path, json={**BODIES[path], "stream": True})

    assert 200 == reply.status_code
    assert "text/event-stream; charset=utf-8" == reply.headers["content-type"]
    assert "no-store" == reply.headers["cache-control"]
    assert "no" == reply.headers["x-accel-buffering"]
    assert reply.text.startswith(": keep-alive\n\n")
    assert "\r" not in reply.text
    *deltas, (last, done) = frames(reply.text)
    assert [("delta", '{"content":"Hel"}'), ("delta", '{"content":"lo"}')] == deltas
    assert "done" == last
    fitted = {"limit": 100, "prompt_tokens": 3, "turns_kept": 1, "turns_dropped": 0}
    context = {"context": fitted} if path == "/v1/chat" else {}
    assert {
        "finish_reason": "stop",
        "usage": USAGE,
        "tokens_generated": 2,
        "cached": False,
        "session_id": None,
        "request_id": reply.headers["x-request-id"],
        "model": MODEL,
        **context,
    } == json.loads(done)


def steady(text: str) -> str:
    """Replace what differs between two responses to one request."""
    return re.sub(r'"(id|request_id|created)":("[^"]*"|[0-9]+)', r'"\1":0', text)


async def messages_of(web, path, **fields):
    """Send a request, and return the body of each ASGI message of its response that has one."""
    bodies = []

    async def counting(scope, receive, send):
        async def note(message):
            if message["type"] == "http.response.body" and message["body"]:
                bodies.append(message["body"])
            await send(message)

        await web.app(scope, receive, note)

    transport = httpx.ASGITransport(counting)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=AUTH) as client:
        await client.post(path, json={**STREAMING[path], **fields, "stream": True})
    return bodies


@pytest.mark.parametrize("path", STREAMING)
async def test_frames_that_are_ready_at_once_leave_in_one_message(path):
    """Each costs a call of the server and a packet; the bytes are those of frames that leave one by one."""
    texts: list[Step] = [f"{number} " for number in range(5)]
    paced: list[Step] = [step for text in texts for step in (text, 0.02)]
    at_once, one_by_one = [
        await messages_of(await make_web(ScriptedService(steps=steps)), path) for steps in (texts, paced)
    ]

    joined = [steady(b"".join(bodies).decode()) for bodies in (at_once, one_by_one)]
    assert joined[0] == joined[1]
    assert len(at_once) <= 2
    assert len(texts) + 1 <= len(one_by_one)


async def test_every_field_reaches_the_service_under_its_canonical_name(web, client):
    body = {
        **CHAT,
        "max_new_tokens": 7,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "repetition_penalty": 1.5,
        "stop": "END",
        "seed": 11,
        "model": "m",
        "session_id": "s",
        "n": 2,
        "min_p": 0.25,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "logit_bias": {"17": -100, "5": 0.5},
        "logprobs": True,
        "stop_token_ids": [9, 2, 9],
        "ignore_eos": True,
        "min_tokens": 3,
    }

    await client.post("/v1/chat", json=body, headers={"X-Request-ID": "mine"})

    (request,) = web.service.requests
    assert (Message(Role.USER, "hello"),) == request.messages
    assert ("s", "m", 2, True) == (request.session_id, request.model, request.n, request.cache)
    assert (Tenant.configured(), "admin") == (request.tenant, web.service.principals[0].key_id)
    assert ("mine", "/v1/chat") == (request.origin.request_id, request.origin.route)
    expected = SamplingParams(
        max_tokens=7,
        temperature=1.0,
        top_p=0.5,
        top_k=3,
        repetition_penalty=1.5,
        stop=("END",),
        seed=11,
        min_p=0.25,
        presence_penalty=-1.0,
        frequency_penalty=1.5,
        logit_bias=((5, 0.5), (17, -100.0)),
        logprobs=0,
        stop_token_ids=(2, 9),
        ignore_eos=True,
        min_tokens=3,
    )
    assert (expected, frozenset()) == (request.sampling, request.unset)
    assert "mine" != request.id
    assert (False, True, False) == (request.stream, request.cache_random, request.use_recommended)


async def test_what_is_left_out_is_unset_and_nothing_else(web, client):
    """Values that are the same as the neutral ones count as given."""
    await client.post("/v1/generate", json={**GENERATE, "temperature": 0, "top_k": 0, "stream": True})

    (request,) = web.service.requests
    assert (SamplingParams(), {"max_tokens", "min_tokens", "top_p", "min_p", "repetition_penalty"}) == (
        request.sampling,
        request.unset,
    )
    assert ("hello", (), None, True) == (request.text, request.messages, request.prompt_ids, request.stream)


@pytest.mark.parametrize(("given", "expected"), [(True, 0), (False, None), (None, None), (0, 0), (20, 20)])
async def test_log_probabilities_are_requested_by_a_flag_or_by_a_number(web, client, given, expected):
    await client.post("/v1/generate", json={**GENERATE, "logprobs": given})

    assert expected == web.service.requests[0].sampling.logprobs


async def test_two_requests_of_one_request_id_are_two_generations(web, client):
    for _ in range(2):
        await client.post("/v1/generate", json=GENERATE, headers={"X-Request-ID": "same"})

    assert 2 == len({request.id for request in web.service.requests})


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        ({}, {}, True),
        ({"cache": False}, {}, False),
        ({}, {"Cache-Control": "No-Cache, max-age=0"}, False),
        ({}, {"Cache-Control": "max-age=0"}, True),
    ],
)
async def test_the_cache_can_be_bypassed(web, client, fields, headers, expected):
    await client.post("/v1/generate", json={**GENERATE, **fields}, headers=headers)

    assert expected is web.service.requests[0].cache


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (EngineBusy("Full.", retry_after=1.2), 503, "service_unavailable"),
        (ContextLengthExceeded(prompt_tokens=9, max_tokens=9, limit=10), 400, "context_length_exceeded"),
        (RuntimeError("secret words"), 500, "internal_server_error"),
    ],
)
async def test_a_refusal_before_the_answer_begins_is_an_ordinary_error(stream, refusal, status, code):
    web = await make_web(ScriptedService(refusal=refusal))
    async with web.client() as client:
        reply = await client.post("/v1/chat", json={**CHAT, "stream": stream})

    assert status == reply.status_code
    assert code == reply.json()["error"]
    assert is_envelope(reply)
    assert ("2" if status == 503 else None) == reply.headers.get("retry-after")
    assert "secret words" not in reply.text


@pytest.mark.parametrize("failure", [EngineBusy("Gone."), InternalError("x"), RuntimeError("secret words")])
async def test_an_error_in_mid_stream_is_the_last_frame(failure, log_lines):
    web = await make_web(ScriptedService(steps=["Hel", failure]))
    async with web.client() as client:
        reply = await client.post("/v1/chat", json={**CHAT, "stream": True})

    assert ["delta", "error"] == [name for name, _ in frames(reply.text)]
    envelope = json.loads(frames(reply.text)[-1][1])
    assert {"error", "message", "details", "timestamp", "request_id"} == set(envelope)
    assert reply.headers["x-request-id"] == envelope["request_id"]
    assert "secret words" not in reply.text + str(log_lines)
    assert isinstance(failure, RuntimeError) == any(line["event"] == "Unexpected error" for line in log_lines)


async def test_an_answer_without_a_last_event_ends_in_an_error_frame():
    web = await make_web(ScriptedService(ends=False))
    async with web.client() as client:
        reply = await client.post("/v1/generate", json={**GENERATE, "stream": True})

    name, data = frames(reply.text)[-1]
    assert ("error", "internal_server_error") == (name, json.loads(data)["error"])


async def test_sessions_are_listed_read_and_forgotten(web, client):
    turn = Turn((Message(Role.USER, "hi"), Message(Role.ASSISTANT, "ho")))
    await web.sessions.append(Tenant.configured(), "mine", turn)
    await web.sessions.append(Tenant.owner("other"), "theirs", turn)

    listed = (await client.get("/v1/sessions")).json()["sessions"]
    read = (await client.get("/v1/sessions/mine")).json()
    deleted = await client.delete("/v1/sessions/mine")

    assert [("mine", 1)] == [(session["session_id"], session["turns"]) for session in listed]
    assert [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] == read["messages"]
    assert read["created"].endswith("Z")
    assert 204 == deleted.status_code
    assert b"" == deleted.content
    assert [] == (await client.get("/v1/sessions")).json()["sessions"]


async def test_a_title_is_masked_as_messages_are_and_listed():
    """No title is null; only white space, or more than 200 characters, is refused."""
    web = await make_web(engines={MODEL: EchoEngine(model=MODEL)})
    async with web.client() as client:
        await client.post("/v1/chat", json={**CHAT, "session_id": "mine"})
        before = (await client.get("/v1/sessions")).json()["sessions"][0]["title"]
        named = await client.patch("/v1/sessions/mine", json={"title": "  Mail of jane.doe@example.com "})
        refused = [
            (await client.patch("/v1/sessions/mine", json={"title": each})).status_code for each in (" ", "x" * 201)
        ]
        listed = (await client.get("/v1/sessions")).json()["sessions"][0]["title"]
        read = (await client.get("/v1/sessions/mine")).json()["title"]

    assert before is None
    assert {"session_id": "mine", "title": "Mail of [EMAIL]"} == named.json()
    assert [400, 400] == refused
    assert ("Mail of [EMAIL]", "Mail of [EMAIL]") == (listed, read)


async def test_deleting_a_session_waits_for_its_turn_no_longer_than_the_deadline():
    """504, and the session stays; once the turn has ended it is deleted."""
    web = await make_web(deadlines={"waiting_seconds": 0.05})
    turn = Turn((Message(Role.USER, "hi"), Message(Role.ASSISTANT, "ho")))
    await web.sessions.append(Tenant.configured(), "mine", turn)
    async with web.client() as client:
        async with web.sessions.turn(Tenant.configured(), "mine"):
            late = await asyncio.wait_for(client.delete("/v1/sessions/mine"), HANG_SECONDS)
        read = await client.get("/v1/sessions/mine")
        deleted = await client.delete("/v1/sessions/mine")

    assert (504, "deadline_exceeded") == (late.status_code, late.json()["error"])
    assert is_envelope(late)
    assert [200, 204] == [read.status_code, deleted.status_code]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
async def test_another_tenants_session_is_as_unknown_as_one_that_never_was(web, client, method):
    turn = Turn((Message(Role.USER, "hi"), Message(Role.ASSISTANT, "ho")))
    await web.sessions.append(Tenant.owner("other"), "theirs", turn)

    body = {"title": "Mine now"} if method == "PATCH" else None
    replies = [(await client.request(method, f"/v1/sessions/{name}", json=body)) for name in ("theirs", "never")]

    assert [404, 404] == [reply.status_code for reply in replies]
    assert replies[0].json()["message"] == replies[1].json()["message"]
    assert await web.sessions.read(Tenant.owner("other"), "theirs")


async def test_without_session_memory_there_are_no_sessions():
    web = await make_web(chat_history={"enabled": False})
    async with web.client() as client:
        reply = await client.get("/v1/sessions")

    assert 404 == reply.status_code
    assert is_envelope(reply)


async def test_status_in_full_needs_a_key(client, web):
    """Without one it tells nothing of queues, processes and errors; and a wrong one is wrong here too."""
    full = (await client.get("/status")).json()
    async with web.client(nothing="") as stranger:
        public = await stranger.get("/status")
    async with web.client(**{"X-API-Key": "wrong"}) as guesser:
        assert 401 == (await guesser.get("/status")).status_code

    assert ("cpu: model loaded on CPU", "ready") == (full["status"], full["state"])
    assert {"engine": {"state": "ready"}, "database": "ok", "embeddings": {}}.items() <= full.items()
    assert {"status", "state", "uptime_seconds", "model", "cache"} == public.json().keys()
    assert ("cpu: model loaded on CPU", {"model": MODEL, "device": "cpu"}) == (
        public.json()["status"],
        public.json()["model"],
    )


async def test_the_uptime_does_not_follow_a_clock_that_is_set(web, monkeypatch):
    """As on a machine whose clock is wrong until it has asked another one."""
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    async with web.client(nothing="") as stranger:
        for path in ("/health", "/status"):
            assert 0 <= (await stranger.get(path)).json()["uptime_seconds"] < 3600


async def test_status_can_be_kept_to_those_with_a_key():
    web = await make_web(security={"status_public": False})
    async with web.client(nothing="") as stranger:
        assert 401 == (await stranger.get("/status")).status_code
    async with web.client() as client:
        assert 200 == (await client.get("/status")).status_code


async def test_a_listed_origin_may_call_from_a_browser_and_no_other():
    web = await make_web(security={"cors_origins": ["https://good.example"]})
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    async with web.client(nothing="") as client:
        good = await client.options("/v1/chat", headers={"Origin": "https://good.example", **preflight})
        bad = await client.options("/v1/chat", headers={"Origin": "https://evil.example", **preflight})
        refused = await client.post("/v1/chat", json=CHAT, headers={"Origin": "https://good.example"})

    assert 200 == good.status_code
    assert "https://good.example" == good.headers["access-control-allow-origin"]
    assert "access-control-allow-credentials" not in good.headers
    assert "access-control-allow-origin" not in bad.headers
    # A page must be able to read why it was refused.
    assert (401, "https://good.example") == (refused.status_code, refused.headers["access-control-allow-origin"])


async def test_no_request_waits_for_a_thread(client, monkeypatch):
    """FastAPI runs plain functions in threads, which costs more than anything that they do here."""

    async def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plain function was run in a thread")

    monkeypatch.setattr("fastapi.dependencies.utils.run_in_threadpool", refuse)
    monkeypatch.setattr("fastapi.routing.run_in_threadpool", refuse)
    monkeypatch.setattr("starlette._exception_handler.run_in_threadpool", refuse)

    replies = [await client.post(path, json=body) for path, body in BODIES.items()]
    replies += [await client.get(path) for path in ("/", "/health", "/readyz", "/status", "/metrics", "/v1/sessions")]

    assert {200} == {reply.status_code for reply in replies}
    assert 404 == (await client.get("/v1/sessions/unknown")).status_code
