"""The OpenAPI document, and that responses are what it says."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from app.access.faults import Fault
from app.engine.base import EngineStatus
from app.engine.echo import EchoEngine
from app.types import EngineState
from app.web.admin.health import Health, Readiness, Status
from app.web.native.batch import BatchResponse
from app.web.native.chat import ChatResponse
from app.web.native.generate import GenerateResponse
from app.web.native.schemas import DoneFrame
from app.web.openai.response_objects import ChatCompletion as ChatCompletionObject
from app.web.openai.response_objects import TextCompletion
from tests.web.harness import (
    BATCH,
    BODIES,
    MODEL,
    OPENAI_BODIES,
    ScriptedService,
    Web,
    frames,
    make_web,
    speaks_openai,
)

GENERATING = {**BODIES, "/v1/generate/batch": BATCH, **OPENAI_BODIES}
NATIVE: dict[str, Any] = {
    "/v1/generate": GenerateResponse,
    "/v1/generate/batch": BatchResponse,
    "/v1/chat": ChatResponse,
}
OPENAI: dict[str, Any] = {"/v1/chat/completions": ChatCompletionObject, "/v1/completions": TextCompletion}
FIELDS: list[dict[str, Any]] = [{}, {"n": 2}, {"logprobs": 2}, {"n": 2, "logprobs": 0, "max_tokens": 2}]
OPENAI_FIELDS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}, {"service_tier": "auto"}],
    "/v1/completions": [{}, {"n": 2}, {"logprobs": 1}, {"echo": True}, {"prompt": ["a", "b"]}],
}


def schema_of(document: dict[str, Any], path: str) -> str:
    """Return the name of the schema of a route's response."""
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
    return str(content["schema"].get("$ref", "")).rpartition("/")[-1]


def validated(schema: Any, content: str | bytes) -> Any:
    """Return a body that is as its schema says: no field that is not documented, no type that would be converted."""
    return TypeAdapter(schema).validate_json(content, strict=True, extra="forbid")


async def echoing() -> Web:
    return await make_web(engines={MODEL: EchoEngine(model=MODEL)})


@pytest.mark.parametrize("path", [*NATIVE, *OPENAI])
async def test_the_document_names_the_schema_of_each_response(web, path):
    assert {**NATIVE, **OPENAI}[path].__name__ == schema_of(web.app.openapi(), path)


async def test_every_error_is_documented_with_the_envelope_of_its_path(web):
    """And every schema that is named is there."""
    document = web.app.openapi()
    for path, operations in document["paths"].items():
        name = "OpenAIErrorResponse" if speaks_openai(path) else "ErrorBody"
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status[0] in "45" and (path, status) not in {("/readyz", "503"), ("/health", "503")}:
                    assert f"#/components/schemas/{name}" == response["content"]["application/json"]["schema"]["$ref"]
    named = set(re.findall(r"'#/components/schemas/(\w+)'", str(document)))
    assert named <= document["components"]["schemas"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("path", NATIVE)
async def test_native_responses_are_as_documented(path, fields):
    """Those of a scripted service with a session's context, and real ones, replayed ones among them."""
    for web in (await make_web(), await echoing()):
        async with web.client() as client:
            for _ in range(2):
                reply = await client.post(path, json={**GENERATING[path], **fields})
                validated(NATIVE[path], reply.content)


@pytest.mark.parametrize("fault", [None, Fault.FULL])
@pytest.mark.parametrize("state", EngineState)
async def test_probes_are_as_documented_whatever_the_state(state, fault):
    class InState(EchoEngine):
        def status(self) -> EngineStatus:
            return replace(super().status(), state=state)

    web = await make_web(engines={MODEL: InState(model=MODEL)})
    if fault:
        web.container.access.database.breaker.trip(fault)
    async with web.client() as client:
        for path, schema in (("/health", Health), ("/readyz", Readiness), ("/status", Status)):
            validated(schema, (await client.get(path)).content)


async def test_a_batch_with_a_failed_prompt_is_as_documented():
    web = await make_web(ScriptedService(refusal=RuntimeError("secret words")))
    async with web.client() as client:
        reply = await client.post("/v1/generate/batch", json=BATCH)

    batch = validated(BatchResponse, reply.content)
    assert "internal_server_error" == batch["results"][0]["error"].error


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("path", BODIES)
async def test_the_last_frame_of_a_native_stream_is_as_documented(path, fields):
    web = await echoing()
    async with web.client() as client:
        reply = await client.post(path, json={**BODIES[path], **fields, "stream": True})

    name, data = frames(reply.text)[-1]
    assert "done" == name
    validated(DoneFrame, data)


@pytest.mark.parametrize(("path", "field"), [("/v1/generate", "prompt"), ("/v1/chat", "context")])
async def test_a_field_that_is_missing_or_new_would_be_noticed(client, path, field):
    """Also one inside of another."""
    reply = (await client.post(path, json=BODIES[path])).json()
    wrong = [
        {name: value for name, value in reply.items() if name != field},
        {**reply, "extra": 1},
        {**reply, "usage": {**reply["usage"], "extra": 1}},
        {**reply, "tokens_generated": "2"},
    ]

    for body in wrong:
        with pytest.raises(ValueError, match="validation error"):
            validated(NATIVE[path], json.dumps(body))


@pytest.mark.parametrize(
    ("path", "fields"), [(path, fields) for path, several in OPENAI_FIELDS.items() for fields in several], ids=str
)
async def test_openais_package_reads_every_response_of_its_dialect(path, fields):
    types: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
        "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
        "/v1/completions": (Completion, Completion),
    }
    kind, chunk = types[path]
    web = await echoing()
    async with web.client() as client:
        whole = await client.post(path, json={**OPENAI_BODIES[path], **fields})
        stream = await client.post(path, json={**OPENAI_BODIES[path], **fields, "stream": True})

    kind.model_validate_json(whole.content, strict=True)
    validated(OPENAI[path], whole.content)
    chunks = [line[6:] for line in stream.text.splitlines() if line.startswith("data: ")]
    assert "[DONE]" == chunks.pop()
    for each in chunks:
        # Of plain completions the package has one type, in which a choice has ended.
        ended = each if chunk is ChatCompletionChunk else each.replace('"finish_reason":null', '"finish_reason":"stop"')
        chunk.model_validate_json(ended, strict=True)


async def test_the_header_that_names_a_session_is_documented_where_it_is_read(web):
    document = web.app.openapi()
    (header,) = document["paths"]["/v1/chat/completions"]["post"]["parameters"]

    assert ("x-session-id", "header", False) == (header["name"], header["in"], header["required"])
    for path in GENERATING.keys() - {"/v1/chat/completions"}:
        assert "parameters" not in document["paths"][path]["post"]


@pytest.mark.parametrize("path", GENERATING)
async def test_every_generating_route_documents_its_whole_body(web, path):
    """Each field that it takes is in the schema, and no other body is documented."""
    document = web.app.openapi()
    body = document["paths"][path]["post"]["requestBody"]
    (content,) = body["content"].values()
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[-1]]

    assert body["required"]
    assert ["application/json"] == list(body["content"])
    assert GENERATING[path].keys() | {"model", "stream", "n", "temperature"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == GENERATING[path].keys()
