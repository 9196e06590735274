"""Pages of listed origins: what they may send, what they may read, and that nobody else may either."""

import re

import pytest

from app.web.http.cors import READABLE_HEADERS
from app.web.http.private_api import served_methods
from tests.web.harness import AUTH, BODIES, OPENAI_BODIES, Web, make_web

ORIGIN = {"Origin": "https://chat.example"}
PREFLIGHT = {**ORIGIN, "Access-Control-Request-Method": "POST"}
STAINLESS = ", ".join(
    f"x-stainless-{name}"
    for name in "arch lang os package-version retry-count runtime runtime-version timeout helper-method".split()
)
EVERY_PAGES = {
    "cache-control",
    "content-language",
    "content-length",
    "content-type",
    "expires",
    "last-modified",
    "pragma",
}
"""Headers that a page may read of any answer: the Fetch standard's list."""
NOT_FOR_PROGRAMS = {
    *("access-control-allow-origin", "access-control-expose-headers", "vary"),
    *("content-security-policy", "cross-origin-resource-policy", "referrer-policy"),
    *(
        "x-accel-buffering",
        "x-content-type-options",
        "x-frame-options",
        "connection",
        "transfer-encoding",
        "date",
        "server",
    ),
}
"""Headers that only the browser and the connection read."""


@pytest.fixture
async def web() -> Web:
    return await make_web(security={"cors_origins": ["https://chat.example"]}, openai={"unknown_fields": "ignore"})


@pytest.mark.parametrize(
    "names",
    [
        "authorization, content-type",
        f"authorization,{STAINLESS}",
        "x-any-thing, traceparent",
        "X-API-Key",
        "!#$%&'*+.^_`|~",
    ],
)
async def test_an_allowed_origin_may_send_the_headers_that_it_asks_for(client, names):
    reply = await client.options("/v1/chat/completions", headers={**PREFLIGHT, "Access-Control-Request-Headers": names})

    assert (200, names) == (reply.status_code, reply.headers["access-control-allow-headers"])
    assert "https://chat.example" == reply.headers["access-control-allow-origin"]
    assert "7200" == reply.headers["access-control-max-age"]
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    "names", ["a b", "a\x0bb", "é".encode().decode("latin-1"), "a;b", '"a"', "a" * 129, ",".join(["a"] * 65), "<x>"]
)
async def test_what_is_no_name_of_a_header_is_not_written_back(client, names):
    headers = {**PREFLIGHT, "Access-Control-Request-Headers": names.encode("latin-1")}

    reply = await client.options("/v1/chat/completions", headers=headers)

    assert 400 == reply.status_code
    assert not {"access-control-allow-headers", "access-control-allow-origin"} & set(reply.headers)


async def test_another_origin_may_send_nothing(client):
    headers = {**PREFLIGHT, "Origin": "https://evil.example", "Access-Control-Request-Headers": "authorization"}

    reply = await client.options("/v1/chat/completions", headers=headers)

    assert 400 == reply.status_code
    assert "access-control-allow-origin" not in reply.headers


async def test_a_page_may_call_into_its_visitors_own_network(client):
    """The operator lists the origins, and nobody else's pages get this answer."""
    headers = {**PREFLIGHT, "Access-Control-Request-Private-Network": "true"}

    reply = await client.options("/v1/chat/completions", headers=headers)

    assert (200, "true") == (reply.status_code, reply.headers["access-control-allow-private-network"])


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
async def test_every_method_that_a_route_has_is_allowed(client, web, method):
    assert method in {each for methods in served_methods(web.app).values() for each in methods}

    reply = await client.options("/v1/keys/x", headers={**PREFLIGHT, "Access-Control-Request-Method": method})

    assert 200 == reply.status_code


async def test_a_page_may_read_every_header_that_is_meant_for_programs():
    """Answers of every route and every kind: whole, streamed, refused by whomever, in both dialects."""
    web = await make_web(
        security={"cors_origins": ["https://chat.example"], "failed_keys_per_minute": 1},
        openai={"unknown_fields": "ignore"},
        rate_limit={"requests_per_minute": 60, "burst_size": 30, "tokens_per_minute": 100_000},
    )
    sent: set[str] = set()
    statuses = set()
    exposed = ""
    for headers in (AUTH, {"nothing": ""}):
        async with web.client(**headers, **ORIGIN) as client:
            for path in [*served_methods(web.app), "/nowhere", "/v1/moderations"]:
                for method in ("GET", "POST", "BREW"):
                    body = {**BODIES, **OPENAI_BODIES}.get(path) if method == "POST" else None
                    for extra in ({}, {"stream": True}, {"stream": True, "extra": 1}) if body else ({},):
                        content = None if body is None else {**body, **extra}
                        reply = await client.request(method, re.sub("{.*?}", "x", path), json=content)
                        sent |= set(reply.headers)
                        statuses.add(reply.status_code)
                        exposed = reply.headers["access-control-expose-headers"]

    assert {200, 401, 404, 405, 415, 429} <= statuses
    assert {"x-ignored-fields", "retry-after", "x-ratelimit-remaining-tokens", "x-cache", "allow"} <= sent
    assert set() == sent - EVERY_PAGES - NOT_FOR_PROGRAMS - {name.lower() for name in READABLE_HEADERS}
    assert set(READABLE_HEADERS) == set(exposed.split(", "))


def test_headers_that_only_errors_have_are_readable_too():
    """Those that the sources write and no answer above has: in quotes, as names of headers."""
    from pathlib import Path

    root = Path(__file__).parents[2] / "app" / "web"
    named = {
        name.lower()
        for path in root.rglob("*.py")
        for name in re.findall(r'b?"((?:[Xx]|[Rr]etry)-[A-Za-z-]+)"', path.read_text())
    }
    requested = {"x-api-key", "x-session-id"}
    refusing = {"x-content-type-options", "x-frame-options"}

    assert {"x-should-retry", "x-cache", "retry-after"} <= named
    assert set() == named - requested - refusing - {name.lower() for name in READABLE_HEADERS}
