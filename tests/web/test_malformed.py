"""Malformed bodies and headers: always the envelope, never a 500, never an echo.

The requests stand in `malformed.py`.
"""

import json
import re
from typing import Any

import pytest
from msgspec import structs

from app.requests import RESOLVABLE, Origin
from app.types import SamplingParams
from app.web.http.private_api import served_methods
from tests.web.harness import AUTH, BATCH, BODIES, LOADING_PATHS, OPENAI_BODIES, is_envelope, make_web
from tests.web.malformed import (
    CANARY,
    JSON,
    OTHER_FORMS,
    WRONG_BATCHES,
    WRONG_BODIES,
    WRONG_CHATS,
    WRONG_FIELDS,
    WRONG_TEXTS,
    WRONG_TYPES,
)

# What it runs again and again is measured by other tests.
pytestmark = pytest.mark.no_cover

ROUTES = [*BODIES, "/v1/generate/batch"]
EVERY_ROUTE = [*ROUTES, *OPENAI_BODIES]
RIGHT = {**BODIES, "/v1/generate/batch": BATCH, **OPENAI_BODIES}


def body(path: str, **fields: Any) -> bytes:
    return json.dumps({**RIGHT[path], **fields}).encode()


BODY_CASES = [(f"{route} {name}", route, content) for route in EVERY_ROUTE for name, content in WRONG_BODIES]
FIELD_CASES = [
    (f"{route} {name[:20]}={value!r:.20}", route, name, value) for route in ROUTES for name, value in WRONG_FIELDS
]
FIELD_CASES += [(f"generate {name}={value!r:.20}", "/v1/generate", name, value) for name, value in WRONG_TEXTS]
FIELD_CASES += [(f"batch {name}={value!r:.60}", "/v1/generate/batch", name, value) for name, value in WRONG_BATCHES]
FIELD_CASES += [(f"chat {name}={value!r:.60}", "/v1/chat", name, value) for name, value in WRONG_CHATS]


def assert_refused(reply, lines, status=400):
    assert status == reply.status_code, reply.text
    assert is_envelope(reply)
    assert CANARY not in reply.text + str(dict(reply.headers)) + str(lines)
    assert len(reply.content) < 4000


async def test_the_table_is_as_long_as_it_should_be():
    assert len(WRONG_FIELDS) + len(WRONG_BODIES) + len(WRONG_TYPES) >= 120


async def test_wrong_bodies_are_refused_without_echo(web, client, log_lines, subtests):
    for name, route, content in BODY_CASES:
        with subtests.test(name):
            reply = await client.post(route, content=content, headers={"Content-Type": JSON})
            assert_refused(reply, log_lines)
    assert [] == web.service.requests


async def test_wrong_fields_are_refused_by_name_without_echo(web, client, log_lines, subtests):
    for name, route, field, value in FIELD_CASES:
        with subtests.test(name):
            reply = await client.post(route, content=body(route, **{field: value}), headers={"Content-Type": JSON})
            assert_refused(reply, log_lines)
            named = {error["field"] for error in reply.json()["details"]["errors"]}
            if (len(field) < 30 and "<" not in field and field != "__class__") or value == 10**40:
                assert any(one.split(".")[0] in (field, "body") for one in named)
            assert all(len(one) <= 80 for one in named)
            assert "<" not in str(named)
    assert [] == web.service.requests


RIGHT_FOR_OPENAI = [("top_k", -1), ("seed", -1), ("user", CANARY)]
"""Wrong on the native routes only."""


async def test_wrong_fields_are_refused_in_openais_dialect_too(web, client, log_lines, subtests):
    for route in OPENAI_BODIES:
        for field, value in WRONG_FIELDS:
            if (field, value) in RIGHT_FOR_OPENAI:
                continue
            with subtests.test(f"{route} {field[:20]}={value!r:.20}"):
                content = body(route, **{field: value})
                reply = await client.post(route, content=content, headers={"Content-Type": JSON})
                assert_refused(reply, log_lines)
                assert "<" not in str(reply.json()["error"]["param"])
    assert [] == web.service.requests


async def test_wrong_types_are_refused_without_echo(web, client, log_lines, subtests):
    for route in EVERY_ROUTE:
        for headers in WRONG_TYPES:
            with subtests.test(f"{route} {headers}"):
                request = client.build_request("POST", route, content=body(route), headers=headers)
                assert_refused(await client.send(request), log_lines, 415)
    assert [] == web.service.requests


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=UTF-8", 'application/json; charset="utf-8"'])
@pytest.mark.parametrize("route", ROUTES)
async def test_json_may_name_its_charset(client, route, content_type):
    reply = await client.post(route, content=body(route), headers={"Content-Type": content_type})

    assert 200 == reply.status_code


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_tokens": 5, "max_new_tokens": 6}, ("max_tokens", "max_new_tokens")),
        ({"max_new_tokens": 5, "max_length": 6}, ("max_new_tokens", "max_length")),
        ({"stop": "a", "stop_sequences": ["b"]}, ("stop", "stop_sequences")),
        ({"stop_sequences": ["a"], "stop_tokens": ["a", "b"]}, ("stop_sequences", "stop_tokens")),
        ({"n": 1, "num_return_sequences": 2}, ("n", "num_return_sequences")),
    ],
)
async def test_two_names_of_one_field_must_agree(client, route, fields, names):
    reply = await client.post(route, json={**RIGHT[route], **fields})

    assert_refused(reply, [])
    assert all(name in reply.json()["message"] for name in names)


@pytest.mark.parametrize("route", ROUTES)
async def test_two_names_with_one_value_are_fine(web, client, route):
    fields = {"max_tokens": 5, "max_length": 5, "stop": "a", "stop_tokens": ["a"], "n": 2, "num_return_sequences": 2}

    reply = await client.post(route, json={**RIGHT[route], **fields})

    assert 200 == reply.status_code
    (request,) = web.service.requests
    assert (5, ("a",), 2) == (request.max_tokens, request.sampling.stop, request.n)


@pytest.mark.parametrize("route", ROUTES)
async def test_null_is_what_was_left_out(web, client, route):
    names = """stream cache ignore_eos truncation
        max_tokens max_new_tokens max_length temperature top_p top_k repetition_penalty stop stop_sequences
        stop_tokens seed model n num_return_sequences min_p presence_penalty frequency_penalty logit_bias logprobs
        stop_token_ids min_tokens""".split()

    reply = await client.post(route, json={**RIGHT[route], **dict.fromkeys(names)})

    assert 200 == reply.status_code
    (request,) = web.service.requests
    assert (SamplingParams(), RESOLVABLE, 1) == (request.sampling, request.unset, request.n)


@pytest.mark.parametrize("route", EVERY_ROUTE)
async def test_what_clients_write_in_another_form_is_what_they_mean(web, client, route, subtests):
    """Whole numbers as floats, stop strings that stop nothing, null, and a nucleus of nothing, which is greedy."""
    for field, value, parameter, expected in OTHER_FORMS:
        with subtests.test(f"{field}={value!r}"):
            reply = await client.post(route, json={**RIGHT[route], "temperature": 0.5, field: value})

            assert 200 == reply.status_code, reply.text
            sampling = web.service.requests[-1].sampling
            assert expected == getattr(sampling, parameter)
            assert type(expected) is type(getattr(sampling, parameter))


@pytest.mark.parametrize("route", EVERY_ROUTE)
async def test_an_unknown_field_that_is_null_or_empty_is_left_out(web, client, route):
    """Wherever it stands; a name that might be a secret needs no other rule."""
    nothing: dict[str, Any] = {
        "temprature": None,
        "extra_body": {},
        "bad_words": [],
        "chat_template": "",
        "4111111111111111": None,
    }
    content = {**RIGHT[route], **nothing}
    if "messages" in content:
        content["messages"] = [{"role": "user", "content": "hello", "flags": [], "weight": None}]

    reply = await client.post(route, json=content)
    plain = await client.post(route, json=RIGHT[route])

    assert (200, 200) == (reply.status_code, plain.status_code), reply.text
    first, second = (structs.replace(each, id="", origin=Origin()) for each in web.service.requests)
    assert first == second
    assert "x-ignored-fields" not in reply.headers


@pytest.mark.parametrize("value", [0, False, [None], {"a": None}, " "])
async def test_a_field_that_holds_something_is_not_empty(client, value):
    reply = await client.post("/v1/chat/completions", json={**RIGHT["/v1/chat/completions"], "unknown": value})

    assert (400, "unknown") == (reply.status_code, reply.json()["error"]["param"])


async def test_an_unknown_field_is_named(client):
    reply = await client.post("/v1/chat", json={**BODIES["/v1/chat"], "temprature": 1})

    assert [{"field": "temprature", "reason": "there is no such field"}] == reply.json()["details"]["errors"]


UNSHOWN = ["4111111111111111", "sk-live-abc", "llm_hhDqXM5S_GSdUw", "jane@example.com", "+41791234567", "a b", "A" * 30]


@pytest.mark.parametrize("name", UNSHOWN)
@pytest.mark.parametrize("route", EVERY_ROUTE)
async def test_an_unknown_field_whose_name_may_be_a_secret_is_not_named(client, log_lines, route, name):
    """At the top and inside of a message; the refusal says where it stands."""
    bodies: list[tuple[dict[str, Any], str]] = [({**RIGHT[route], name: 1}, "body")]
    if "messages" in RIGHT[route]:
        bodies.append(({"messages": [{"role": "user", "content": "a", name: 1}]}, "messages.0"))
    for content, where in bodies:
        reply = await client.post(route, json=content)

        assert_refused(reply, log_lines)
        assert name not in reply.text + str(log_lines)
        assert f"{where}: holds a field that does not exist, whose name is not shown" in reply.text


@pytest.mark.parametrize("name", ["temprature", "chat_template", "maxTokens", "reasoning"])
async def test_an_unknown_field_that_is_a_plain_word_is_named(client, name):
    reply = await client.post("/v1/chat/completions", json={**RIGHT["/v1/chat/completions"], name: 1})

    assert (name, f"{name}: there is no such field") == (
        reply.json()["error"]["param"],
        reply.json()["error"]["message"],
    )


NO_OBJECT = "Input should be a valid dictionary or object to extract fields from"
REASONS: list[tuple[str, bytes, list[tuple[str, str]]]] = [
    *[(route, content, [("body", NO_OBJECT)]) for route in EVERY_ROUTE for content in (b"null", b"7", b"[]", b'"{}"')],
    *[(route, b"{}", [(next(iter(RIGHT[route])), "Field required")]) for route in EVERY_ROUTE],
    *[
        (route, body(route, max_tokens="5"), [("max_tokens", "Input should be a valid integer")])
        for route in EVERY_ROUTE
    ],
    *[(route, body(route, stream=1), [("stream", "Input should be a valid boolean")]) for route in EVERY_ROUTE],
    *[(route, body(route, temprature=1), [("temprature", "there is no such field")]) for route in EVERY_ROUTE],
    *[
        (
            route,
            body(route, n=9, temprature=1, temperature="hot"),
            [
                ("temperature", "Input should be a valid number"),
                ("n", "Input should be less than or equal to 8"),
                ("temprature", "there is no such field"),
            ],
        )
        for route in EVERY_ROUTE
    ],
    ("/v1/chat", body("/v1/chat", messages=[[]]), [("messages.0", NO_OBJECT)]),
    (
        "/v1/chat",
        body("/v1/chat", messages=[{}]),
        [("messages.0.role", "Field required")],
    ),
    ("/v1/chat/completions", body("/v1/chat/completions", messages=["x"]), [("messages.0", NO_OBJECT)]),
]
"""A body, and what is wrong with it: the fields and reasons as FastAPI's own validation words them."""


async def test_a_refusal_has_the_reasons_that_it_always_had(client, subtests):
    """Byte for byte, in the order of the fields."""
    for route, content, errors in REASONS:
        with subtests.test(f"{route} {content!r:.60}"):
            reply = await client.post(route, content=content, headers={"Content-Type": JSON})
            message = f"{errors[0][0]}: {errors[0][1]}"
            if route in OPENAI_BODIES:
                param = None if errors[0][0] == "body" else errors[0][0]
                kind = "invalid_request_error"
                expected: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": kind}}
            else:
                expected = {
                    "error": "validation_error",
                    "message": message,
                    "details": {"errors": [{"field": field, "reason": reason} for field, reason in errors]},
                    "timestamp": reply.json()["timestamp"],
                    "request_id": reply.headers["x-request-id"],
                }
            assert json.dumps(expected, separators=(",", ":")) == reply.text


async def test_a_field_deep_inside_is_named_by_its_path(client):
    messages = [{"role": "user", "content": "a"}, {"role": "pirate", "content": "b"}]

    reply = await client.post("/v1/chat", json={"messages": messages})

    (error,) = reply.json()["details"]["errors"]
    assert "messages.1.role" == error["field"]
    assert "'assistant'" in error["reason"]


async def test_many_errors_are_cut_to_a_few(client):
    reply = await client.post("/v1/chat", json={f"field{number}": CANARY for number in range(5000)})

    assert_refused(reply, [])
    assert 20 == len(reply.json()["details"]["errors"])


async def test_very_many_errors_are_counted(client):
    for route, kind in (("/v1/chat", "message"), ("/v1/chat/completions", "error")):
        reply = await client.post(route, json={f"field{number}": CANARY for number in range(20_000)})

        assert_refused(reply, [])
        message = reply.json()[kind]
        said = message if kind == "message" else message["message"]
        assert "body: holds 20001 mistakes, too many to name them" == said


@pytest.mark.parametrize(
    ("route", "fields", "field"),
    [
        ("/v1/generate", {"prompt": "é" * 11}, "prompt"),
        (
            "/v1/chat",
            {"messages": [{"role": "system", "content": "a" * 10}, {"role": "user", "content": "b"}]},
            "messages",
        ),
        ("/v1/generate/batch", {"prompts": ["é" * 10, "b"]}, "prompts"),
    ],
)
async def test_the_refusal_of_too_long_a_text_names_the_limit_and_its_length(route, fields, field):
    web = await make_web(security={"max_prompt_chars": 10})
    async with web.client(**AUTH) as client:
        reply = await client.post(route, json=fields)
        fits = await client.post("/v1/generate", json={"prompt": "é" * 10})

    assert (
        f"{field} has 11 characters; this service takes at most 10 (security.max_prompt_chars)"
        == reply.json()["message"]
    )
    assert 200 == fits.status_code


@pytest.mark.parametrize(
    "path",
    ["/v1/sessions/a%20b", "/v1/sessions/" + "a" * 129, "/v1/sessions/%ff", "/v1/sessions/a%00", "/v1/sessions/é"],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_wrong_session_ids_are_refused(client, method, path):
    reply = await client.request(method, path)

    assert_refused(reply, [])
    assert "session_id" == reply.json()["details"]["errors"][0]["field"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", f"/{CANARY}", 404, "not_found"),
        ("POST", "/v1/generate/", 404, "not_found"),
        ("GET", "/v1/generate", 405, "method_not_allowed"),
        ("PUT", "/v1/sessions/a", 405, "method_not_allowed"),
        ("BREW", "/v1/chat", 405, "method_not_allowed"),
    ],
)
async def test_the_routers_own_errors_have_the_envelope(client, log_lines, method, path, status, code):
    reply = await client.request(method, path)

    assert_refused(reply, log_lines, status)
    assert code == reply.json()["error"]
    assert (status == 405) is ("allow" in reply.headers)


async def test_a_wrong_method_is_answered_with_all_right_ones_in_the_dialect_of_the_path(web, client):
    """Every method that a path is not served by; the header names those of all its routes."""
    for path, methods in served_methods(web.app).items():
        # To these, what lies below /v1/models is the name of a model, and below /page that of a file.
        elsewhere = {"GET", "HEAD"} if path in {*LOADING_PATHS, "/page/key"} else set()
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "BREW"} - methods - elsewhere:
            reply = await client.request(method, re.sub("{.*?}", "x", path))

            assert (405, ", ".join(sorted(methods))) == (reply.status_code, reply.headers["allow"]), (method, path)
            assert method == "HEAD" or is_envelope(reply)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/audio/speech",
        "/v1/responses/x",
        "/v1/responses/x/y",
        "/v1/models/a/b",
        "/v1/uploads",
        "/v1/chat/completions/",
    ],
)
@pytest.mark.parametrize("headers", [AUTH, {"nothing": ""}], ids=["with a key", "without"])
async def test_paths_of_openais_that_are_not_served_have_its_envelope(web, path, headers):
    """Its clients read the message there, and none of the service's own routes lies below these."""
    async with web.client(**headers) as client:
        reply = await client.get(path)

    assert reply.status_code == (404 if headers is AUTH else 401)
    assert {"message", "type", "param", "code"} == reply.json()["error"].keys()
