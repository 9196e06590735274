"""What surrounds every request: ids, timing, the log line, figures, bounds on bodies, and probes."""

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from pydantic import TypeAdapter

from app.access.key_format import new_key
from app.engine.base import EngineStatus
from app.engine.echo import EchoEngine
from app.types import EngineState
from app.web.admin.health import Readiness
from app.web.http.private_api import served_methods
from tests.web.harness import (
    AUTH,
    CHAT,
    GENERATE,
    MODEL,
    LoadingEngine,
    RecordingEngine,
    ScriptedService,
    Web,
    is_envelope,
    make_web,
)


@pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 128])
async def test_a_plain_request_id_is_given_back(client, given):
    assert given == (await client.get("/health", headers={"X-Request-ID": given})).headers["x-request-id"]


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b" ",
        b"x" * 129,
        b"a b",
        b"a\r\nSet-Cookie: x",
        b"a\n",
        "日本".encode(),
        b"\xe9",
        b"a\x00",
        b"<b>",
        b"x" * 10_000,
    ],
)
async def test_any_other_request_id_is_replaced(client, given):
    reply = await client.get("/health", headers=[(b"X-Request-ID", given)])

    assert 200 == reply.status_code
    UUID(reply.headers["x-request-id"])


@pytest.mark.parametrize("headers", [AUTH, {"Authorization": f"Bearer {AUTH['X-API-Key']}"}])
async def test_a_key_in_the_header_of_the_request_id_is_not_repeated(web, log_lines, headers):
    """Neither the one that was sent as a key, nor another of this service."""
    async with web.client(**headers) as client:
        for given in (AUTH["X-API-Key"], new_key()):
            reply = await client.get("/health", headers={"X-Request-ID": given})

            UUID(reply.headers["x-request-id"])
            assert given not in str(log_lines)


@pytest.mark.parametrize("headers", [AUTH, {"Authorization": f"Bearer {AUTH['X-API-Key']}"}])
async def test_a_short_request_id_is_given_back_though_it_stands_in_the_key_by_chance(web, headers):
    async with web.client(**headers) as client:
        for given in ("0", "e", "key", "1234567"):
            assert given == (await client.get("/health", headers={"X-Request-ID": given})).headers["x-request-id"]


async def test_two_request_ids_are_none(client):
    reply = await client.get("/health", headers=[("X-Request-ID", "a"), ("X-Request-ID", "b")])

    UUID(reply.headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/nowhere", 404), ("DELETE", "/health", 405), ("POST", "/v1/chat", 400)],
)
async def test_every_answer_has_an_id_and_a_time(client, method, path, status):
    reply = await client.request(method, path)

    assert (415 if status == 400 else status) == reply.status_code
    assert reply.headers["x-request-id"]
    assert 0 <= float(reply.headers["x-process-time"]) < 10


async def test_each_request_has_one_log_line(client, log_lines):
    await client.post("/v1/generate?secret=1", json={"prompt": "private words"}, headers={"X-Request-ID": "r1"})

    (line,) = log_lines
    assert 0 < line.pop("latency_ms") < 10_000
    assert {
        "event": "POST /v1/generate - 200",
        "log_level": "info",
        "method": "POST",
        "route": "/v1/generate",
        "status_code": 200,
        "request_id": "r1",
        "key_id": "admin",
    } == line


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/sessions/private-id", "/v1/sessions/{session_id}", 404),
        ("PUT", "/v1/sessions/private-id", "/v1/sessions/{session_id}", 405),
        ("GET", "/private/path", "unmatched", 404),
        ("GET", "/v1/sessions", "/v1/sessions", 200),
    ],
)
async def test_lines_and_figures_name_the_routes_template(web, client, log_lines, method, path, route, status):
    await client.request(method, path)

    (line,) = log_lines
    assert (route, status) == (line["route"], line["status_code"])
    served = status in (200, 404) and route != "unmatched"
    pair = f'endpoint="{route}",method="{method}"' if served else 'endpoint="unmatched",method="OTHER"'
    assert f'http_requests_total{{{pair},status="{status}"}} 1.0' in figures(web)
    assert "private" not in str(line) + figures(web)


async def test_the_log_line_of_a_request_without_a_key_names_its_route(web, log_lines):
    async with web.client(nothing="") as client:
        await client.post("/v1/chat", json=CHAT)

    assert ("/v1/chat", 401, None) == tuple(log_lines[0][name] for name in ("route", "status_code", "key_id"))


async def test_invented_methods_and_paths_make_no_new_series(web, client):
    await client.request("BREW", "/first")
    before = figures(web).count("\n")
    for number in range(50):
        await client.request(f"BREW{number}", f"/path{number}", headers={"User-Agent": f"agent{number}"})

    assert before == figures(web).count("\n")


@pytest.mark.parametrize("key", [True, False], ids=["with a key", "without"])
async def test_only_methods_that_a_route_is_served_by_have_series(key):
    """Every method on every path, and many paths that do not exist: one series for all that no route serves."""
    web = await make_web(security={"failed_keys_per_minute": 100_000})
    served = served_methods(web.app)
    paths = [re.sub("{.*?}", "x", path) for path in served] + [f"/no{number}" for number in range(20)]
    async with web.client(**(AUTH if key else {"nothing": ""})) as client:
        for path in [*paths, *paths]:
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"):
                await client.request(method, path, headers={"X-Request-ID": f"{method}-1"})

    found = re.findall(r'http_request_duration_seconds_count{endpoint="(.*?)",method="(.*?)"}', figures(web))
    assert 2 < len(found) <= 1 + sum(map(len, served.values()))
    assert {("unmatched", "OTHER")} == {pair for pair in found if pair[1] not in served.get(pair[0], ())}


async def test_an_unexpected_error_is_logged_where_it_came_from_but_not_with_what_was_sent(log_lines):
    web = await make_web(ScriptedService(refusal=RuntimeError("private words")))
    async with web.client() as client:
        reply = await client.post("/v1/generate", json={"prompt": "private words"})

    assert (500, "internal_server_error") == (reply.status_code, reply.json()["error"])
    assert is_envelope(reply)
    error, access = log_lines
    assert ("RuntimeError", "error") == (error["error"], error["log_level"])
    assert "in generate" in error["exception"]
    assert 500 == access["status_code"]
    assert "private words" not in str(log_lines) + reply.text


def sized(length: int) -> bytes:
    return b'{"prompt": "' + b"a" * (length - 14) + b'"}'


async def chunks(content: bytes):
    for start in range(0, len(content), 100):
        yield content[start : start + 100]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_may_be_so_long_and_no_longer(chunked):
    web = await make_web(security={"max_body_bytes": 1000})
    async with web.client() as client:
        replies = [
            await client.post(
                "/v1/generate",
                content=chunks(sized(length)) if chunked else sized(length),
                headers={"Content-Type": "application/json"},
            )
            for length in (1000, 1001)
        ]

    assert [200, 413] == [reply.status_code for reply in replies]
    assert ("payload_too_large", {"limit": 1000}) == (replies[1].json()["error"], replies[1].json()["details"])
    assert "close" == replies[1].headers["connection"]
    assert "connection" not in replies[0].headers
    assert is_envelope(replies[1])


async def unread() -> AsyncIterator[bytes]:
    """A body that must not be read."""
    yield pytest.fail("the body was read")


@pytest.mark.parametrize("length", ["99999999999999999999999999", "1001", "9" * 5000])
async def test_a_body_announced_as_too_long_is_not_read(length):
    web = await make_web(security={"max_body_bytes": 1000})

    async with web.client() as client:
        headers = {"Content-Type": "application/json", "Content-Length": length}
        reply = await client.post("/v1/generate", content=unread(), headers=headers)

    assert 413 == reply.status_code


async def test_no_body_is_read_before_the_key_is_checked(web):
    async with web.client(nothing="") as client:
        reply = await client.post("/v1/generate", content=unread())

    assert 401 == reply.status_code


@pytest.mark.parametrize(
    ("state", "status", "word"),
    [
        (EngineState.READY, 200, "ready"),
        (EngineState.LOADING, 503, "loading"),
        (EngineState.UNRESPONSIVE, 503, "unresponsive"),
        (EngineState.RESTARTING, 503, "restarting"),
        (EngineState.FAILED, 503, "failed"),
        (EngineState.CLOSED, 503, "draining"),
    ],
)
async def test_health_is_always_well_and_readiness_follows_the_engine(state, status, word):
    class InState(EchoEngine):
        def status(self) -> EngineStatus:
            return replace(super().status(), state=state)

    web = await make_web(engines={MODEL: InState(model=MODEL)})
    async with web.client() as client:
        health, ready = await client.get("/health"), await client.get("/readyz")

    loaded = state is EngineState.READY
    known: dict[str, Any] = {
        "status": "healthy",
        "service": "LLM service",
        "api_status": "running",
        "gpu_status": "unavailable",
    }
    known |= {"model_status": "loaded" if loaded else word, "model_loaded": loaded, "model_name": MODEL}
    assert 200 == health.status_code
    assert known.items() <= health.json().items()
    assert {"timestamp", "uptime_seconds"} == health.json().keys() - known.keys()
    assert (status, {"status": word}) == (ready.status_code, ready.json())
    TypeAdapter(Readiness).validate_json(ready.content, strict=True, extra="forbid")
    assert ("retry-after" in ready.headers) is (status == 503)


async def test_only_hosts_that_are_listed_are_answered_except_for_probes():
    web = await make_web(security={"allowed_hosts": ["llm.example", "*.example.org"]})
    async with web.client() as client:

        async def status(host: str, path: str = "/v1/models") -> int:
            return (await client.get(path, headers={"Host": host})).status_code

        for host in ("llm.example", "LLM.example:8000", "a.example.org", "a.b.example.org:443"):
            assert 200 == await status(host)
        for host in ("evil.example", "llm.example.evil", "example.org", "10.0.0.7:8000", ""):
            assert 400 == await status(host)
        assert [200] * 3 == [await status("10.0.0.7:8000", path) for path in ("/health", "/readyz", "/metrics")]


async def test_health_speaks_as_an_older_service_where_it_is_configured():
    """Its words; and a pod whose readiness is read there gets no requests before its model serves."""
    compat = {"health_status": "ok", "health_needs_model": True}
    web = await make_web(app={"name": "LLM-Generator"}, compat=compat)
    loading = await make_web(engines={MODEL: LoadingEngine(model=MODEL)}, compat=compat)
    async with web.client(nothing="") as client, loading.client(nothing="") as early:
        well, not_yet = await client.get("/health"), await early.get("/health")

    assert (200, "ok", "LLM-Generator") == (well.status_code, well.json()["status"], well.json()["service"])
    assert (503, "loading") == (not_yet.status_code, not_yet.json()["model_status"])
    assert int(not_yet.headers["retry-after"]) >= 1


async def test_health_says_whether_the_model_is_on_a_gpu():
    web = await make_web(engines={MODEL: RecordingEngine(device="cuda:0")})
    async with web.client() as client:
        health, status = (await client.get("/health")).json(), (await client.get("/status")).json()

    assert ("available", "cuda: model loaded on GPU") == (health["gpu_status"], status["status"])


async def test_the_front_page_says_where_to_go(client):
    page = (await client.get("/")).json()

    assert {"name", "version", "links"} == set(page)
    for path in ("/health", "/readyz"):
        assert path in page["links"].values()


async def test_figures_are_prometheus_text(web, client):
    await client.post("/v1/generate", json=GENERATE)

    reply = await client.get("/metrics")

    assert web.metrics.render()[1] == reply.headers["content-type"]
    assert "http_request_duration_seconds_count" in reply.text
    assert AUTH["X-API-Key"] not in reply.text


def figures(web: Web) -> str:
    return web.metrics.render()[0].decode()


async def test_errors_are_counted_by_their_codes(web, client):
    await client.post("/v1/generate", json={"prompt": 3})
    await client.get("/nowhere")
    await client.get("/nowhere")
    async with web.client(nothing="") as stranger:
        await stranger.get("/v1/models")
    figures = web.metrics.render()[0].decode()

    for line in ('error="validation_error"} 1.0', 'error="not_found"} 2.0', 'error="unauthorized"} 1.0'):
        assert f"errors_total{{{line}" in figures
    assert "api_requests_total 4.0" in figures
