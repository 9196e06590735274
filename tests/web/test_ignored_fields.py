"""`openai.unknown_fields: ignore`: what the service does not have or cannot honour is left out, and named."""

from typing import Any

import pytest
from msgspec import structs

from app.engine.base import Capabilities
from app.requests import Origin
from tests.web.harness import (
    AUTH,
    BODIES,
    KEY,
    OPENAI_BODIES,
    RecordingEngine,
    ScriptedService,
    Web,
    make_web,
)

HEADER = "x-ignored-fields"
IGNORE = {"unknown_fields": "ignore"}


@pytest.fixture
async def web() -> Web:
    return await make_web(openai=IGNORE)


UNHONOURED: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "temprature"),
    ({"use_beam_search": True, "chatTemplate": "x"}, "use_beam_search, chatTemplate"),
    (
        {"stream_options": {"include_obfuscation": True, "pings": 5}},
        "stream_options.include_obfuscation, stream_options.pings",
    ),
    ({"4111111111111111": 1, "sk-live-abc": 2, "a\r\nSet-Cookie: b": 3, "é": 4}, "-, -, -, -"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", OPENAI_BODIES)
async def test_what_cannot_be_honoured_is_ignored_and_named(web, client, path, stream, subtests):
    """The request is the same as without the fields; a name that may be a secret or a header of its own is a hyphen."""
    await client.post(path, json={**OPENAI_BODIES[path], "stream": stream})
    for fields, named in UNHONOURED:
        with subtests.test(named):
            if "stream_options" in fields and not stream:
                continue
            reply = await client.post(path, json={**OPENAI_BODIES[path], "stream": stream, **fields})

            assert 200 == reply.status_code, reply.text
            assert set(named.split(", ")) == set(reply.headers[HEADER].split(", "))
            assert named.count(",") == reply.headers[HEADER].count(",")
            assert "set-cookie" not in reply.headers
    plain, *others = [structs.replace(each, id="", origin=Origin()) for each in web.service.requests]
    assert [plain] * len(others) == others


async def test_fields_of_a_message_are_ignored_by_their_path(web, client):
    message = {"role": "user", "content": "hello", "weight": 1}

    reply = await client.post("/v1/chat/completions", json={"messages": [message]})

    assert (200, "messages.0.weight") == (reply.status_code, reply.headers[HEADER])


async def test_the_header_is_bounded(web, client):
    """Twenty names, and that there were more."""
    fields = {f"field_{chr(97 + number)}": 1 for number in range(26)}

    reply = await client.post("/v1/chat/completions", json={**BODIES["/v1/chat"], **fields})

    names = reply.headers[HEADER].split(", ")
    assert (21, "...") == (len(names), names[-1])
    assert len(reply.headers[HEADER]) < 1000


@pytest.mark.parametrize("path", OPENAI_BODIES)
async def test_a_wrong_value_of_a_known_field_is_still_refused(web, client, path):
    """With the header: whoever mends the value knows what else was wrong."""
    reply = await client.post(path, json={**OPENAI_BODIES[path], "temperature": "hot", "temprature": 1})

    assert (400, "temperature", "temprature") == (
        reply.status_code,
        reply.json()["error"]["param"],
        reply.headers[HEADER],
    )


async def test_a_refusal_of_the_service_names_what_was_ignored_too():
    web = await make_web(ScriptedService(refusal=RuntimeError("x")), openai=IGNORE)
    async with web.client(**AUTH) as client:
        reply = await client.post("/v1/chat/completions", json={**BODIES["/v1/chat"], "temprature": 1})

    assert (500, "temprature") == (reply.status_code, reply.headers[HEADER])


@pytest.mark.parametrize("mode", ["ignore", "refuse"])
async def test_a_sampling_parameter_that_the_model_cannot_honour_is_ignored_like_a_field(mode):
    """As with a model that is not batched."""
    engine = RecordingEngine(model="m", capabilities=Capabilities(unsupported=("min_p", "top_k", "logit_bias")))
    web = await make_web(engines={"m": engine}, openai={"unknown_fields": mode}, cache={"enabled": False})
    async with web.client(**AUTH) as client:
        fields = {"min_p": 0.5, "top_k": 0, "logit_bias": {"5": 1}}
        reply = await client.post("/v1/chat/completions", json={**BODIES["/v1/chat"], **fields})

    if mode == "ignore":
        assert (200, "min_p, logit_bias") == (reply.status_code, reply.headers[HEADER])
        assert (0.0, ()) == (engine.requests[0].sampling.min_p, engine.requests[0].sampling.logit_bias)
    else:
        assert (400, "min_p") == (reply.status_code, reply.json()["error"]["param"])
        assert HEADER not in reply.headers


async def test_the_native_routes_refuse_what_they_do_not_know_whatever_openais_do(web, client):
    for path, body in BODIES.items():
        reply = await client.post(path, json={**body, "temprature": 1})

        assert (400, False) == (reply.status_code, HEADER in reply.headers)


async def test_nothing_is_ignored_by_default():
    web = await make_web()
    async with web.client(**{"X-API-Key": KEY}) as client:
        reply = await client.post("/v1/chat/completions", json={**BODIES["/v1/chat"], "use_beam_search": True})

    assert (400, False) == (reply.status_code, HEADER in reply.headers)
