"""The documented schema of every request body against its validation: bounds, nullability, and what is left out."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import validator_for

from tests.web.access import running
from tests.web.harness import make_web
from tests.web.malformed import WRONG_BATCHES, WRONG_CHATS, WRONG_FIELDS, WRONG_TEXTS

# What it runs again and again is measured by other tests.
pytestmark = pytest.mark.no_cover

RIGHT: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "a"},
    "/v1/generate/batch": {"prompts": ["a"]},
    "/v1/chat": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/keys": {},
    "/v1/keys/{key_id}": {},
    "/v1/keys/{key_id}/rotate": {},
    "/v1/roles/{name}": {},
    "/v1/sessions/{session_id}": {"title": "a"},
    "/generate": {"prompt": "a"},
    "/predict": {"prompt": "a"},
    "/predict/batch": {"prompts": ["a"]},
    "/v1/stream": {"prompt": "a"},
    "/v1/adapters/load": {"adapter_name": "a", "source": "a"},
    "/v1/adapters/unload": {"adapter_name": "a"},
    "/generate_apikey": {"username": "anna"},
    "/load_model": {"model_name": "a"},
    "/v1/models/load": {"model_name": "a"},
    "/v1/models/unload": {"model_name": "a"},
}
"""Every path that takes a body, with the least that it takes."""
GENERATING = [
    path
    for path in RIGHT
    if path.startswith("/v1/") and not re.search("key|role|session|batches|adapter|/models/", path)
]
GENERATING += ["/generate", "/predict", "/predict/batch"]
QUICK = {
    "/v1/chat",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/batches",
    "/v1/embeddings",
    "/v1/keys",
    "/v1/models/load",
    "/predict",
    "/tokenize",
}
"""Paths whose fields are those of the others, too."""
NATIVE = ["/v1/generate", "/v1/generate/batch", "/v1/chat"]
CROSS_FIELD = re.compile(
    "the last message must be the user's|this service takes at most|are two names of one field"
    "|is not valid JSON of|must be a JSON Schema|must be at most [0-9]+ on this route"
    "|is only possible where parameters and model_name are left out"
)
"""What no schema of single fields can say."""


NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values of a field that nobody knows which say nothing."""


async def document() -> dict[str, Any]:
    return (await make_web()).app.openapi()


def bodies(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and schema of every documented body of JSON, with the schemas that it names."""
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            if described := operation.get("requestBody", {}).get("content", {}).get("application/json"):
                yield path, method, {**described["schema"], "components": found["components"]}


def fields_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a body's schema, wherever that is written."""
    name = schema.get("$ref", "").rpartition("/")[-1]
    properties: dict[str, Any] = (schema["components"]["schemas"][name] if name else schema)["properties"]
    return properties


def values(name: str) -> list[Any]:
    """Return values for a field: of every type, and at both sides of every bound that there is."""
    numbers = [
        -(2**63),
        -(2**63) - 1,
        -101,
        -100,
        -3,
        -2.1,
        -2,
        -1,
        0,
        0.001,
        0.01,
        1,
        1.5,
        2,
        2.1,
        3,
        8,
        9,
        10,
        11,
        20,
    ]
    numbers += [21, 3600, 10**6, 10**6 + 1, 2**31 - 1, 2**31, 10**12, 10**15, 10**15 + 1, 2**63 - 1, 2**63, 2**64]
    texts = ["", "a", "auto", "none", "text", "a b", "a" * 64, "a" * 65, "a" * 128, "a" * 129, "a" * 256, "a" * 257]
    texts += ["a" * 512, "a" * 513, "é", "a\n", "a/b", "anna@b", "system", "2026-11"]
    lists: list[Any] = [
        [],
        ["a"],
        [""],
        ["a" * 257],
        ["a"] * 16,
        ["a"] * 17,
        ["a"] * 64,
        ["a"] * 65,
        ["a"] * 100,
        ["a"] * 101,
    ]
    lists += [
        [1],
        [-1],
        [2**31 - 1],
        [2**31],
        [1] * 64,
        [1] * 65,
        [None],
        [[1]],
        [[]],
        [[1], [2**31]],
        [[1]] * 65,
        [1, "a"],
    ]
    objects: list[Any] = [{}, {"a": 1}, {"5": 1}, {"05": 1}, {"5": 101}, {"5": "a"}, {"a": "b"}, {"a" * 65: "b"}]
    objects += [{"a": "b" * 513}, {str(n): "b" for n in range(17)}, {str(n): 1 for n in range(301)}, {"type": "text"}]
    objects += [{"include_usage": None}, {"include_usage": 1}, {"burst": None}, {"burst": 0}, {"burst": -1}]
    objects += [
        {"manage_keys": None},
        {"manage_keys": True},
        {"models": None},
        {"models": ["a b"]},
        {"models": ["a"] * 101},
    ]
    return [None, True, False, *numbers, *texts, *lists, *objects]


async def accepted(client, method: str, path: str, body: Any) -> tuple[bool, str]:
    """Return whether the validation of a body lets it pass, and what it says."""
    reply = await client.request(method, path.replace("{key_id}", "none").replace("{name}", "none"), json=body)
    # After the validation: 404 for no such model, key or role, 403 for a model that may not be loaded.
    assert reply.status_code in (200, 201, 400, 403, 404), (path, body, reply.text)
    return reply.status_code != 400, reply.text


async def test_the_table_names_every_path_that_takes_a_body():
    assert RIGHT.keys() == {path for path, _, _ in bodies(await document())}


async def test_every_number_of_a_request_has_bounds():
    """Beyond the greatest, a body is refused for its digits before any field is looked at."""
    found = await document()

    def unbounded(schema: Any, where: str) -> Iterator[str]:
        if isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                least = {"minimum", "exclusiveMinimum"} & schema.keys()
                if not least or not {"maximum", "exclusiveMaximum"} & schema.keys():
                    yield where
            for name, inner in schema.items():
                yield from unbounded(inner, f"{where}.{name}")
        elif isinstance(schema, list):
            for inner in schema:
                yield from unbounded(inner, where)

    schemas = found["components"]["schemas"]
    requests = {schema["$ref"].rpartition("/")[-1] for _, _, schema in bodies(found) if "$ref" in schema}
    requests |= {"LimitFields", "RightsFields", "ChatMessage", "TextPart", "MessageFields", "StreamOptions"}
    assert [] == [where for name in sorted(requests) for where in unbounded(schemas[name], name)]


@asynccontextmanager
async def client_of(path: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Call a path with nothing behind its validation that refuses more: a scripted service, or a real database."""
    if path in GENERATING:
        web = await make_web()
        web.service.steps = []
        async with web.client() as client:
            yield client
    else:
        # Nothing is loaded in earnest: no name would be allowed that a worker were started for.
        async with running(folder, model={"allowed": ["not/any"]}) as service, service.client() as client:
            yield client


@pytest.mark.parametrize(
    "path", [path if path in QUICK else pytest.param(path, marks=pytest.mark.soak) for path in RIGHT]
)
async def test_each_field_takes_exactly_what_its_schema_says(tmp_path, path):
    """Types, bounds on both sides, null; a body without the field, and one with a field more."""
    found = await document()
    ((method, schema),) = [(method, schema) for one, method, schema in bodies(found) if one == path]
    fields = fields_of(schema)
    described = validator_for(schema)
    wrong = []
    async with client_of(path, tmp_path) as client:
        for name in [*fields, "unknown"]:
            for value in values(name):
                body = {**RIGHT[path], name: value}
                passes, said = await accepted(client, method, path, body)
                if name == "unknown" and value in NOTHING and path in GENERATING:
                    assert passes or RULES.search(said), said  # no schema says that nothing may have any name
                elif passes and isinstance(value, dict) and all(each in NOTHING for each in value.values()):
                    pass  # nor within an object
                elif passes != described.is_valid(body) and not CROSS_FIELD.search(said) and not RULES.search(said):
                    wrong.append((name, value, passes, said[:200]))
        empty, said = await accepted(client, method, path, {})
        assert empty is described.is_valid({}) or RULES.search(said)

    assert [] == wrong


RULES = re.compile(
    "is only possible where|must be the opposite of|needs a last message|must be n: this|is not possible with logprobs"
    "|names no stored response|only possible with tools|does not embed|nothing is asked of the prompt"
    "|names a token that the model does not have|needs either prompt or messages"
    "|takes no adapters|must not hold an empty text|is needed where|must leave a token|names no file of yours"
)
"""Rules about two fields."""


@pytest.mark.parametrize("path", NATIVE)
async def test_what_is_refused_as_malformed_is_not_documented_as_right(path):
    described = validator_for(next(schema for one, _, schema in bodies(await document()) if one == path))
    wrong = {"/v1/generate": WRONG_TEXTS, "/v1/generate/batch": WRONG_BATCHES, "/v1/chat": WRONG_CHATS}[path]
    documented = []
    for name, value in [*WRONG_FIELDS, *wrong]:
        body = {**RIGHT[path], name: value}
        integral = (isinstance(value, float) and value.is_integer()) or value == [1.0]
        if described.is_valid(body) and not integral and not _is_about_all(name, value):
            documented.append((name, value))

    assert [] == documented


def _is_about_all(name: str, value: Any) -> bool:
    """Return whether the refusal is about the whole conversation."""
    return name == "messages" and isinstance(value, list) and len(value) > 0
