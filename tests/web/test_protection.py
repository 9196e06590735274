"""Who gets in and how often: every route, taken from the OpenAPI document instead of a list."""

import re

import pytest

from app.errors import QuotaExceeded, RateLimited
from app.web.app_factory import public_paths
from tests.web.harness import (
    AUTH,
    BATCH,
    BODIES,
    CHAT,
    COMPAT_BODIES,
    KEY,
    OPENAI_BODIES,
    RESPONSE_BODIES,
    STORED_PATHS,
    ScriptedService,
    frames,
    is_envelope,
    make_web,
)

EMBEDDING = {"/v1/embeddings": {"input": "hello"}}
RIGHT = {**BODIES, "/v1/generate/batch": BATCH, **OPENAI_BODIES, **RESPONSE_BODIES, **EMBEDDING, **COMPAT_BODIES}
GENERATING = set(RIGHT)
COUNTED = {("POST", path) for path in (*GENERATING, *STORED_PATHS)}
"""Only what occupies the model, or a disk, counts against a rate; lists, keys and figures are cheap, and polled by
machines."""
SILENT = {"/", "/health", "/readyz", "/metrics", "/status", "/info"}
"""Probes and figures: their responses do not speak of limits."""


def operations(app):
    """Give each documented (method, path), with path parameters filled in."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"{\w+}", "s", path)


async def test_every_route_but_the_public_ones_needs_a_key(subtests):
    web = await make_web(security={"failed_keys_per_minute": 1000})
    checked = 0
    async with web.client(nothing="") as client:
        for method, path in operations(web.app):
            with subtests.test(f"{method} {path}"):
                reply = await client.request(method, path, content=b"{not json")
                if path in {"/", "/health", "/readyz", "/metrics", "/status", "/info"}:
                    assert 200 == reply.status_code
                else:
                    checked += 1
                    assert 401 == reply.status_code
                    assert "Bearer" == reply.headers["www-authenticate"]
                    assert is_envelope(reply)
    assert 51 == checked


async def test_generating_routes_are_limited_and_no_others(subtests):
    """The others' responses still say what is left."""
    checked = 0
    for method, path in operations((await make_web()).app):
        with subtests.test(f"{method} {path}"):
            web = await make_web(rate_limit={"requests_per_minute": 1, "burst_size": 2})
            async with web.client() as client:
                replies = [await client.request(method, path, json=BODIES.get(path)) for _ in range(3)]
            left = [reply.headers.get("x-ratelimit-remaining-requests") for reply in replies]
            if (method, path) in COUNTED:
                checked += 1
                assert [False, False, True] == [reply.status_code == 429 for reply in replies]
                assert ["1", "0", "0"] == left
            else:
                assert not any(reply.status_code == 429 for reply in replies)
                assert [None if path in SILENT else "2"] * 3 == left
    assert 13 == checked


async def test_every_route_documents_its_errors(web):
    for path, methods in web.app.openapi()["paths"].items():
        for operation in methods.values():
            assert not {"422", "default"} & set(operation["responses"])
            assert {"400", "414", "431", "500", "505"} <= set(operation["responses"])
            if path.startswith("/v1"):
                assert {"401", "429", "500", "503"} <= set(operation["responses"])
                assert {"APIKeyHeader", "HTTPBearer"} == {name for entry in operation["security"] for name in entry}
            if "requestBody" in operation:
                assert {"400", "408", "413", "415"} <= set(operation["responses"])


async def test_a_request_beyond_the_rate_says_when_to_come_back_and_costs_nothing():
    web = await make_web(rate_limit={"requests_per_minute": 6, "burst_size": 1})
    async with web.client() as client:
        granted = await client.post("/v1/chat", json=CHAT)
        refused = [await client.post("/v1/chat", json=CHAT) for _ in range(5)]

    assert 200 == granted.status_code
    assert "10s" == granted.headers["x-ratelimit-reset-requests"]
    for reply in refused:
        assert (429, "rate_limit_exceeded") == (reply.status_code, reply.json()["error"])
        assert 1 <= int(reply.headers["retry-after"]) <= 10
        assert "1" == reply.headers["x-ratelimit-limit-requests"]
        assert is_envelope(reply)
    assert 1 == len(web.service.requests)
    assert b"rate_limited_total 5.0" in web.metrics.render()[0]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"Content-Type": "application/json"}, 400),
        (b"null", {"Content-Type": "application/json"}, 400),
        (b"{}", {"Content-Type": "application/json"}, 400),
        (b'{"max_tokens": "5"}', {"Content-Type": "application/json"}, 400),
        (b'{"temprature": 1}', {"Content-Type": "application/json"}, 400),
        (b"hello", {"Content-Type": "text/plain"}, 415),
    ],
)
@pytest.mark.parametrize("path", sorted(GENERATING))
async def test_malformed_requests_count_and_carry_the_rate_headers(path, content, headers, status):
    web = await make_web(rate_limit={"requests_per_minute": 1, "burst_size": 5, "tokens_per_minute": 70})
    async with web.client() as client:
        replies = [await client.post(path, content=content, headers=headers) for _ in range(2)]

    assert [status] * 2 == [reply.status_code for reply in replies]
    assert ["4", "3"] == [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert ["1m0s", "2m0s"] == [reply.headers["x-ratelimit-reset-requests"] for reply in replies]
    assert ("5", "70") == tuple(replies[0].headers[f"x-ratelimit-limit-{kind}"] for kind in ("requests", "tokens"))
    assert ("70", "0s") == tuple(replies[0].headers[f"x-ratelimit-{what}-tokens"] for what in ("remaining", "reset"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", sorted(GENERATING - {"/v1/generate/batch", *EMBEDDING, *COMPAT_BODIES}))
@pytest.mark.parametrize("kind", [RateLimited, QuotaExceeded])
async def test_a_request_that_the_service_refuses_for_its_tokens_costs_a_request(path, stream, kind):
    """So a client that keeps sending is refused before any work is done; one that waits as it is told has a request."""
    refusal = kind("No tokens are left.", retry_after=7)
    web = await make_web(ScriptedService(refusal=refusal), rate_limit={"requests_per_minute": 1, "burst_size": 2})
    async with web.client() as client:
        replies = [await client.post(path, json={**RIGHT[path], "stream": stream}) for _ in range(4)]

    assert [429] * 4 == [reply.status_code for reply in replies]
    assert ["1", "0", "0", "0"] == [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert 2 == len(web.service.requests)
    assert "7" == replies[0].headers["retry-after"]
    assert [True] * 3 == [55 <= int(reply.headers["retry-after"]) <= 60 for reply in replies[1:]]


@pytest.mark.parametrize("path", sorted(GENERATING - EMBEDDING.keys()))
async def test_a_wrong_method_is_405_and_costs_no_request(path):
    web = await make_web(rate_limit={"requests_per_minute": 1, "burst_size": 1})
    async with web.client() as client:
        wrong = [await client.request(method, path) for method in ("GET", "PUT", "DELETE", "HEAD")]
        right = await client.post(path, json=RIGHT[path])

    assert {405} == {reply.status_code for reply in wrong}
    assert {"POST"} == {reply.headers["allow"] for reply in wrong}
    assert 200 == right.status_code


async def test_streams_carry_the_rate_headers_and_are_refused_before_they_begin():
    web = await make_web(rate_limit={"requests_per_minute": 1, "burst_size": 1})
    async with web.client() as client:
        granted = await client.post("/v1/chat", json={**CHAT, "stream": True})
        refused = await client.post("/v1/chat", json={**CHAT, "stream": True})

    assert "done" == frames(granted.text)[-1][0]
    assert "0" == granted.headers["x-ratelimit-remaining-requests"]
    assert (429, "application/json") == (refused.status_code, refused.headers["content-type"])


async def test_an_unexpected_failure_carries_the_rate_headers_too():
    web = await make_web(ScriptedService(refusal=RuntimeError("x")))
    async with web.client() as client:
        reply = await client.post("/v1/chat", json=CHAT)

    assert 500 == reply.status_code
    assert "99999" == reply.headers["x-ratelimit-remaining-requests"]


async def test_the_default_limits_can_be_switched_off():
    web = await make_web(rate_limit={"enabled": False, "requests_per_minute": 1, "burst_size": 1})
    async with web.client() as client:
        replies = [await client.post("/v1/chat", json=CHAT) for _ in range(3)]

    assert [200] * 3 == [reply.status_code for reply in replies]
    assert "x-ratelimit-limit-requests" not in replies[0].headers


@pytest.mark.parametrize(
    "headers",
    [
        [("X-API-Key", KEY)],
        [("Authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer  {KEY} ")],
        [("X-API-Key", KEY), ("Authorization", f"Bearer {KEY}")],
        # A proxy in front may have a login of its own.
        [("X-API-Key", KEY), ("Authorization", "Basic dXNlcjpwYXNz")],
    ],
)
async def test_the_right_key_gets_in_by_either_header(web, headers):
    async with web.client(nothing="") as client:
        assert 200 == (await client.send(client.build_request("GET", "/status", headers=headers))).status_code


WRONG_KEYS: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"X-API-Key", b"")],
    [(b"X-API-Key", b" ")],
    [(b"X-API-Key", b"wrong")],
    [(b"X-API-Key", KEY.encode() + b"x")],
    [(b"X-API-Key", KEY[:-1].encode())],
    [(b"X-API-Key", KEY.upper().encode())],
    [(b"X-API-Key", b"k\xe9y")],
    [(b"X-API-Key", "schlüssel".encode())],
    [(b"X-API-Key", b"\xff\xfe\xfd")],
    [(b"X-API-Key", b"a\x00b")],
    [(b"X-API-Key", KEY.encode() + b"\x00")],
    [(b"X-API-Key", b"k" * 8192)],
    [(b"X-API-Key", KEY.encode()), (b"X-API-Key", KEY.encode())],
    [(b"X-API-Key", KEY.encode()), (b"X-API-Key", b"wrong")],
    [(b"X-API-Key", f"{KEY}, {KEY}".encode())],
    [(b"X-API-Key", f"Bearer {KEY}".encode())],
    [(b"X-API-Key", b"wrong"), (b"Authorization", f"Bearer {KEY}".encode())],
    [(b"X-API-Key", KEY.encode()), (b"Authorization", b"Bearer wrong")],
    [(b"X-API-Key", KEY.encode()), (b"Authorization", b"Bearer")],
    [(b"Authorization", KEY.encode())],
    [(b"Authorization", b"Bearer")],
    [(b"Authorization", b"Bearer ")],
    [(b"Authorization", f"Basic {KEY}".encode())],
    [(b"Authorization", f"Bearer {KEY} {KEY}".encode())],
    [(b"Authorization", f"Bearer {KEY}".encode())] * 2,
    [(b"Authorization", b"Bearer k\xe9y")],
]


async def test_anything_but_one_right_key_is_401_and_never_500(subtests):
    web = await make_web(security={"failed_keys_per_minute": 1000})
    async with web.client(nothing="") as client:
        for headers in WRONG_KEYS:
            with subtests.test(str(headers)[:80]):
                reply = await client.send(client.build_request("POST", "/v1/chat", json=CHAT, headers=headers))
                assert (401, "unauthorized") == (reply.status_code, reply.json()["error"])
                assert is_envelope(reply)
                assert KEY not in reply.text
    assert [] == web.service.requests
    assert f"auth_failures_total {len(WRONG_KEYS)}.0".encode() in web.metrics.render()[0]


@pytest.mark.parametrize(
    "path",
    ["//health", "/health/", "/health/../v1/models", "/Health", "/v1", "/nowhere", "/docs/", "/docs/x", "/status%2f"],
)
async def test_only_the_exact_public_paths_are_public(web, path):
    async with web.client(nothing="") as client:
        assert 401 == (await client.get(f"http://test{path}")).status_code


@pytest.mark.parametrize("host", ["x/health?", "test/health#", "/health", "health", "a@b/metrics"])
async def test_the_host_header_opens_nothing(web, host):
    async with web.client(nothing="") as client:
        # One that is no name is refused before the key is looked for.
        expected = 401 if host == "health" else 400
        assert expected == (await client.get("/v1/models", headers={"Host": host})).status_code


async def test_public_paths_follow_the_settings():
    web = await make_web(security={"docs": False, "metrics_public": False, "page": False})
    documented = await make_web(security={"docs": True})

    assert {"/", "/health", "/readyz", "/info"} == public_paths(web.container)
    assert {"/docs", "/redoc", "/openapi.json", "/metrics"} < public_paths(documented.container)
    async with web.client(nothing="") as client:
        assert 401 == (await client.get("/metrics")).status_code


async def test_guessing_keys_is_slowed_down_but_locks_nobody_out():
    """After so many failures an address gets 429, and a right key from there still works."""
    web = await make_web(security={"failed_keys_per_minute": 3})
    async with web.client(nothing="") as client:
        guesses = [await client.get("/status", headers={"X-API-Key": f"guess{number}"}) for number in range(5)]
        right = await client.get("/status", headers=AUTH)

    assert [401, 401, 401, 429, 429] == [reply.status_code for reply in guesses]
    assert 1 <= int(guesses[-1].headers["retry-after"]) <= 20
    assert "0" == guesses[-1].headers["x-ratelimit-remaining-requests"]
    assert is_envelope(guesses[-1])
    assert 200 == right.status_code


async def test_right_keys_do_not_count_as_failures():
    web = await make_web(security={"failed_keys_per_minute": 1})
    async with web.client() as client:
        assert [200] * 5 == [(await client.get("/status")).status_code for _ in range(5)]
    async with web.client(nothing="") as stranger:
        assert 401 == (await stranger.get("/v1/models")).status_code


async def test_while_draining_only_probes_are_answered(web, client):
    web.host.draining = True

    refused = await client.post("/v1/chat", json=CHAT)

    assert (503, "service_unavailable") == (refused.status_code, refused.json()["error"])
    assert 1 <= int(refused.headers["retry-after"])
    assert is_envelope(refused)
    assert [] == web.service.requests
    assert 200 == (await client.get("/health")).status_code
    assert 200 == (await client.get("/metrics")).status_code
    ready = await client.get("/readyz")
    assert (503, {"status": "draining"}) == (ready.status_code, ready.json())


async def test_the_key_is_in_no_answer_no_figure_and_no_log_line(web, client, log_lines):
    texts = []
    for method, path in operations(web.app):
        reply = await client.request(method, path, json=BODIES.get(path), params={"api_key": KEY})
        texts.append(reply.text.replace("\\", "") + str(dict(reply.headers)))
    texts.append(str(web.app.openapi()))

    assert KEY not in "".join(texts) + str(log_lines)
