"""OpenAI's error object, with the words that its clients branch on, wherever an error comes from."""

import pytest

from app import errors
from app.engine.echo import EchoEngine
from app.errors import AppError, ContextLengthExceeded, EngineBusy, InternalError, RateLimited
from app.types import Rights
from app.web.openai.errors import ERROR_FORMAT, envelope
from tests.web.harness import AUTH, CHAT, GENERATE, KEY, OneKey, ScriptedService, make_web

BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": GENERATE}
PATHS = [*BODIES, "/v1/models", "/v1/models/x"]


class QuotaUsedUp(AppError):
    """Stands for a quota's error: the code is all that matters."""

    status, code = 429, "quota_exceeded"


def error_fields(reply) -> tuple[int, str, str | None, str]:
    error = reply.json()["error"]
    return reply.status_code, error["type"], error["param"], error["code"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_wrong_key_is_invalid_api_key(path):
    web = await make_web()
    async with web.client(Authorization="Bearer wrong-key-0123456789") as client:
        reply = await client.post(path) if path in BODIES else await client.get(path)

    assert (401, "authentication_error", None, "invalid_api_key") == error_fields(reply)
    assert "Bearer" == reply.headers["www-authenticate"]


@pytest.mark.parametrize("path", BODIES)
async def test_a_bearer_token_is_the_key(path):
    web = await make_web()
    async with web.client(Authorization=f"Bearer {KEY}") as client:
        assert 200 == (await client.post(path, json=BODIES[path])).status_code


@pytest.mark.parametrize("path", BODIES)
async def test_an_unknown_model_is_model_not_found(client, path):
    reply = await client.post(path, json={**BODIES[path], "model": "gpt-4o"})

    assert (404, "invalid_request_error", "model", "model_not_found") == error_fields(reply)


@pytest.mark.parametrize(("path", "field"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
async def test_too_long_a_prompt_is_context_length_exceeded_in_tokens_and_in_characters(path, field):
    refusal = ContextLengthExceeded(prompt_tokens=9, max_tokens=9, limit=10)
    in_tokens = await make_web(ScriptedService(refusal=refusal))
    in_characters = await make_web(security={"max_prompt_chars": 4})
    for web in (in_tokens, in_characters):
        async with web.client(**AUTH) as client:
            reply = await client.post(path, json=BODIES[path])
        assert (400, "invalid_request_error", field, "context_length_exceeded") == error_fields(reply)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (RateLimited("Slow down.", retry_after=7), (429, "rate_limit_error", None, "rate_limit_exceeded")),
        (QuotaUsedUp("Used up.", retry_after=7), (429, "insufficient_quota", None, "insufficient_quota")),
        (EngineBusy("Full.", retry_after=7), (503, "server_error", None, "service_unavailable")),
        (InternalError("No."), (500, "server_error", None, "internal_server_error")),
        (errors.DeadlineExceeded("Late."), (504, "server_error", None, "deadline_exceeded")),
    ],
)
async def test_what_the_service_refuses_has_its_type_and_code(path, refusal, expected):
    """Where the same request may succeed later the answer says when; for a quota a retry is not worth it."""
    web = await make_web(ScriptedService(refusal=refusal))
    async with web.client() as client:
        for stream in (False, True):
            reply = await client.post(path, json={**BODIES[path], "stream": stream})
            assert expected == error_fields(reply)
            assert refusal.message == reply.json()["error"]["message"]
            assert (refusal.retry_after and "7") == reply.headers.get("retry-after")
            assert ("false" if "quota" in expected[3] else None) == reply.headers.get("x-should-retry")


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/chat/completions", (405, "invalid_request_error", None, "method_not_allowed")),
        ("DELETE", "/v1/models", (405, "invalid_request_error", None, "method_not_allowed")),
        ("POST", "/v1/completions/x", (404, "invalid_request_error", None, "not_found")),
        ("GET", "/v1/chat/completions/chatcmpl-1", (404, "invalid_request_error", None, "not_found")),
        ("GET", "/v1/models/", (404, "invalid_request_error", "model", "model_not_found")),
        ("GET", "/v1/models/x", (404, "invalid_request_error", "model", "model_not_found")),
    ],
)
async def test_the_routers_own_errors_have_openais_envelope(client, method, path, expected):
    assert expected == error_fields(await client.request(method, path))


@pytest.mark.parametrize("path", BODIES)
async def test_wrong_bodies_have_openais_envelope(path):
    web = await make_web(security={"max_body_bytes": 50})
    async with web.client(**AUTH) as client:
        plain = await client.post(path, content=b"x", headers={"Content-Type": "text/plain"})
        broken = await client.post(path, content=b"{", headers={"Content-Type": "application/json"})
        long = await client.post(path, json={"prompt": "x" * 100})

    assert (415, "invalid_request_error", None, "unsupported_media_type") == error_fields(plain)
    assert (400, "invalid_request_error", None, "invalid_request_error") == error_fields(broken)
    assert (413, "invalid_request_error", None, "payload_too_large") == error_fields(long)


async def test_a_defect_of_ours_says_nothing_of_itself(log_lines):
    web = await make_web(ScriptedService(refusal=ValueError("private")))
    async with web.client() as client:
        reply = await client.post("/v1/chat/completions", json=CHAT)

    assert (500, "server_error", None, "internal_server_error") == error_fields(reply)
    assert "private" not in reply.text


def test_every_error_of_ours_has_a_type_that_clients_know():
    """Also one that is added later."""
    known = {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "insufficient_quota",
        "server_error",
    }
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AppError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind.__new__(kind)
        AppError.__init__(error, "m")
        rendered = envelope(error, "/v1/completions")["error"]
        assert rendered["type"] in known
        assert ("server_error" == rendered["type"]) == (kind.status >= 500)
        assert isinstance(rendered["code"], str)
        assert {} == ERROR_FORMAT.headers(error) or kind.status == 429


@pytest.mark.parametrize(
    ("path", "openai"),
    [
        ("/v1/models", True),
        ("/v1/models/a/b", True),
        ("/v1/completions/", True),
        ("/v1/chat/completions", True),
        ("/v1/modelsx", True),
        ("/v1/moderations", True),
        ("/v1", True),
        ("/chat/completions", True),
        ("/v1/chat", False),
        ("/v1/chat/x", False),
        ("/v1/generate", False),
        ("/v1/keys/x/rotate", False),
        ("/nowhere", False),
        ("/health", False),
    ],
)
async def test_the_path_decides_the_dialect(web, path, openai):
    """Below /v1 it is OpenAI's, except for the paths of the native routes and below them."""
    error_format = web.app.renderer.format_of(path)

    assert openai is (error_format is ERROR_FORMAT)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/v1/moderations", "/v1/audio/transcriptions", "/v1/uploads", "/v1/nothing_like_it"])
async def test_a_path_that_is_not_served_is_refused_with_what_is(client, method, path):
    reply = await client.request(method, path)

    assert (404, "invalid_request_error", None, "not_found") == error_fields(reply)
    message = reply.json()["error"]["message"]
    assert message.startswith(f"This service has no {path}; it has ")
    assert "/v1/chat/completions, /v1/completions," in message
    assert "/v1/models/{model}" in message
    assert "/v1/generate" not in message


@pytest.mark.parametrize("path", ["/v1/4111111111111111", "/v1/sk-live-abc/x", "/v1/jane@example.com", "/v1/%0d%0ax"])
async def test_a_path_that_may_be_a_secret_is_not_repeated(client, path):
    reply = await client.get(path)

    assert 404 == reply.status_code
    assert reply.json()["error"]["message"].startswith("This service has no such path; it has ")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "but /v1/chat/completions: let the client's base URL end in /v1."),
        ("/models", "but /v1/models: let the client's base URL end in /v1."),
        ("/v1/v1/chat/completions", "but /v1/chat/completions: the client adds /v1 itself."),
    ],
)
async def test_a_base_url_with_v1_too_much_or_too_little_is_recognised(client, path, hint):
    reply = await client.post(path)

    assert f"This service has no {path}, {hint}" == reply.json()["error"]["message"]


async def test_a_wrong_method_is_named_with_the_right_ones(client):
    for path in ("/v1/chat/completions", "/v1/chat"):
        reply = await client.get(path)

        message = reply.json()["error"]["message"] if path.endswith("completions") else reply.json()["message"]
        assert "This path is not served by this method, but by POST." == message
        assert (405, "POST") == (reply.status_code, reply.headers["allow"])


@pytest.mark.parametrize("path", BODIES)
async def test_the_refusal_of_a_model_names_those_that_the_key_may_use(path):
    """All of them, or those of its role; the name that was asked for is not repeated."""
    web = await make_web(engines={name: EchoEngine(model=name) for name in ("first", "second", "third")})
    replies = {}
    keys = web.container.keys
    assert isinstance(keys, OneKey)
    async with web.client(**AUTH) as client:
        for rights in (None, ("second",), ()):
            keys.rights = Rights(models=rights)
            replies[rights] = await client.post(path, json={**BODIES[path], "model": "gpt-4o"})
            assert (404, "invalid_request_error", "model", "model_not_found") == error_fields(replies[rights])

    messages = {rights: reply.json()["error"]["message"] for rights, reply in replies.items()}
    assert "Loaded: first, second, third." in messages[None]
    assert "Loaded: second." in messages[("second",)]
    assert "neither is any other that this key may use" in messages[()]
    assert "gpt-4o" not in str(messages)
