"""The headers that keep browsers from guessing, embedding and storing responses, on every response that there is."""

import re

import httpx

from app.web.admin import documentation
from app.web.http.private_api import served_methods
from tests.web.harness import AUTH, BODIES, CHAT, GENERATE, OPENAI_BODIES, ScriptedService, make_web
from tests.web.raw_sockets import exchange

ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
POLICY = "default-src 'none'; frame-ancestors 'none'"


def assert_protected(reply: httpx.Response) -> None:
    named = f"{reply.request.method} {reply.request.url.path} - {reply.status_code}"
    assert ALWAYS == {name: reply.headers.get(name) for name in ALWAYS}, named
    names = [name for name, _ in reply.headers.multi_items()]
    assert len(names) == len(set(names)), named
    if reply.request.url.path in documentation.PUBLIC_PATHS and reply.status_code == 200:
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    else:
        assert (POLICY, "no-store") == (reply.headers["content-security-policy"], reply.headers["cache-control"]), named


async def test_every_route_and_every_refusal_has_them():
    """With a key and without one, found or not, by right methods and wrong ones, in both dialects."""
    web = await make_web(security={"failed_keys_per_minute": 50, "cors_origins": ["https://good.example"]})
    statuses = set()
    for headers in (AUTH, {"nothing": ""}):
        async with web.client(**headers) as client:
            for path in [
                *served_methods(web.app),
                "/nowhere",
                "/v1/models/none",
                "/v1/sessions/none",
                "/v1/embeddings",
            ]:
                for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"):
                    body = BODIES.get(path) or OPENAI_BODIES.get(path) if method == "POST" else None
                    reply = await client.request(method, re.sub("{.*?}", "x", path), json=body)
                    assert_protected(reply)
                    statuses.add(reply.status_code)
            preflight = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
            assert_protected(await client.options("/v1/chat", headers=preflight))

    assert {200, 401, 404, 405, 415, 429} <= statuses


async def test_what_is_refused_before_it_is_a_request_has_them_too():
    """The server answers by itself to what it cannot parse."""
    web = await make_web()
    async with web.listening() as port:
        client, _ = await exchange(port, [b"nonsense\r\n\r\n"], 1, closes=True)

    head = client.answer.partition(b"\r\n\r\n")[0].decode().lower()
    assert " 400 " in head.splitlines()[0]
    for name, value in {**ALWAYS, "content-security-policy": POLICY, "cache-control": "no-store"}.items():
        assert f"\r\n{name}: {value}".lower() in head
    assert re.search(r"\r\nx-request-id: [0-9a-f-]{36}\r\n", head)


async def test_streams_and_failures_have_them():
    """A stream is no more for a cache than a whole response; a failure of ours is rendered outside of the routes."""
    broken = await make_web(ScriptedService(refusal=RuntimeError("x")))
    web = await make_web(security={"max_body_bytes": 1000})
    async with web.client() as client, broken.client() as unlucky:
        for path, body in {**BODIES, **OPENAI_BODIES}.items():
            stream = await client.post(path, json={**body, "stream": True})
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert_protected(stream)
        large = await client.post("/v1/generate", json={"prompt": "x" * 2000})
        failed = await unlucky.post("/v1/chat", json=CHAT)
        web.host.draining = True
        draining = await client.post("/v1/generate", json=GENERATE)

    assert [413, 500, 503] == [reply.status_code for reply in (large, failed, draining)]
    for reply in (large, failed, draining):
        assert_protected(reply)
