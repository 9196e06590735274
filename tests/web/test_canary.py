"""A key and an e-mail address, driven through every route, and looked for everywhere afterwards."""

import logging
import random
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from app.config import LoggingConfig
from app.engine.echo import EchoEngine
from app.requests import GenerationRequest
from app.telemetry import configure_logging
from tests.web.access import Running, running
from tests.web.harness import COMPAT_BODIES

# What it runs again and again is measured by other tests.
pytestmark = pytest.mark.no_cover

ADDRESS = "canary.jones@example.com"
GENERATING = (
    "/v1/generate",
    "/v1/generate/batch",
    "/v1/chat",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    *COMPAT_BODIES,
)
"""Where the engine breaks."""
UNLOADS = "/unload_model"
"""Would end the model that all others need, and takes no body."""


class FailingEngine(EchoEngine):
    """Breaks, with what it was asked in the error's message, when it is asked to."""

    async def stream(self, request: GenerationRequest):
        text = "".join(chr(each) for each in request.prompt_ids or () if each < 0x110000)
        if "break now" in text:
            raise RuntimeError(f"broke at {text}")
        async for chunk in super().stream(request):
            yield chunk


def body_of(schema: dict[str, Any], components: dict[str, Any], secret: str) -> Any:
    """Make a body of a schema with the canaries wherever a text may stand."""
    schema = components[schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
    for choice in schema.get("anyOf", []):
        if choice.get("type") != "null":
            return body_of(choice, components, secret)
    match schema.get("type"):
        case "object":
            return {name: body_of(each, components, secret) for name, each in schema.get("properties", {}).items()}
        case "array":
            return [body_of(schema["items"], components, secret)]
        case "string":
            return schema.get("const") or schema.get("enum", [f"mail {ADDRESS} key {secret} break now"])[-1]
        case "integer" | "number":
            return 1
    return None


async def drive(service: Running, key: str) -> list[str]:
    """Call every operation with right bodies, with canaries in every field and path, and with nonsense."""
    texts, app = [], service.app
    schema = app.openapi()
    said = f"mail {ADDRESS}, key {key}"
    right: list[dict[str, Any]] = [{"prompt": said}, {"prompt": f"{said} break now"}, {"prompts": [said]}]
    right += [{"messages": [{"role": "user", "content": said}], "session_id": "s"}, {"username": ADDRESS}]
    right += [{"role": ADDRESS, "owner": ADDRESS}, {"rights": {"models": [ADDRESS]}}]
    async with service.client(key) as http:
        for path, operations in schema["paths"].items():
            if path == UNLOADS:
                continue
            for method, operation in operations.items():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json")
                bodies: list[Any] = [None]
                if content:
                    bodies = [*right, body_of(content["schema"], schema["components"]["schemas"], key), ADDRESS]
                    bodies += [{**body, "stream": True} for body in right[:2]]
                for value in ("x", ADDRESS):
                    url = re.sub(r"{\w+}", value, path)
                    for body in bodies:
                        query = {"key": ADDRESS, "after": ADDRESS, "api_key": key} if value == ADDRESS else {}
                        reply = await http.request(method, url, json=body, params=query)
                        texts.append(str(dict(reply.headers)))
                        generates = path in GENERATING
                        assert generates or reply.status_code < 500, (method, url, body)
        texts.append(str((await http.get("/metrics")).text))
        texts.append(str(schema))
    return texts


def all_files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(400)
async def test_neither_a_key_nor_an_address_is_found_anywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Not in a log line, a table (but its digest), a metric, a traceback, a header or /openapi.json."""
    stop = configure_logging(LoggingConfig(level="DEBUG", file=tmp_path / "log"))
    logging.getLogger("sqlalchemy").setLevel(logging.INFO)
    try:
        async with running(
            tmp_path, engine=FailingEngine(), logging={"store_text": True}, cache={"persistent": True}
        ) as service:
            key = await service.key(role="admin")
            texts = await drive(service, key)
    finally:
        logging.getLogger("sqlalchemy").setLevel(logging.NOTSET)
        stop()
    stored = all_files(tmp_path)
    with sqlite3.connect(tmp_path / "service.db") as database:
        (rows,) = database.execute("SELECT count(*) FROM inference_log WHERE prompt LIKE '%[EMAIL]%'").fetchone()
        failed = database.execute("SELECT count(*) FROM inference_log WHERE status = 500").fetchone()[0]
    database.close()

    everything = "".join(texts) + "".join(capfd.readouterr()) + stored.decode("latin-1")
    assert ADDRESS not in everything
    assert key not in everything
    assert key.split("_")[2] not in everything
    assert "RuntimeError" in everything
    assert rows > 5
    assert failed > 0


CARD = "4111111111111111"


def misplaced(secret: str) -> list[dict[str, Any]]:
    """Return requests that hold a secret where none belongs: a name, a key of an object, a parameter, a header."""
    headers = ["X-Session-ID", "Content-Type", "Cache-Control", "Accept", "Referer", "User-Agent", "Cookie", "X-Other"]
    message = {"role": "user", "content": "a"}
    right = {"prompt": "a", "messages": [message], "prompts": ["a"], "username": "anna", "model": "echo"}
    bodies: list[Any] = [
        {secret: 1},
        {**right, secret: secret},
        {"messages": [{**message, secret: 1}]},
        secret,
        [secret],
    ]
    bodies += [
        {"logit_bias": {secret: 1}},
        {"metadata": {secret: 1}},
        {"limits": {secret: 1}},
        {"rights": {secret: True}},
    ]
    bodies += [{"stream_options": {secret: True}}, {"messages": [{"role": secret, "content": "a"}]}, {"model": secret}]
    bodies += [{"session_id": f"{secret} "}, {"role": f"{secret} "}, {"stop": [secret * 20]}, {"tools": [{secret: 1}]}]
    requests: list[dict[str, Any]] = [{"json": body} for body in bodies]
    requests += [{"json": right, "headers": {name: secret}} for name in headers]
    requests += [
        {"json": right, "params": params} for params in ({secret: "1"}, {"key": f"{secret} "}, {"month": secret})
    ]
    return [*requests, {"content": f'{{"{secret}": ', "headers": {"Content-Type": "application/json"}}]


@pytest.mark.parametrize(
    ("kind", "every"),
    [("card", 3), pytest.param("card", 1, marks=pytest.mark.soak), pytest.param("key", 1, marks=pytest.mark.soak)],
)
async def test_no_refusal_repeats_what_stands_in_the_wrong_place(
    kind: str, every: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A key or a card number as a name, in a path, by a wrong method: in no answer, header, log line or row.

    Args: every: how many of the requests stand for one another; each path and method has some of them.
    """
    stop = configure_logging(LoggingConfig(level="DEBUG", file=tmp_path / "log"))
    refused, repeated, draw = 0, [], random.Random(7)
    try:
        async with running(tmp_path, model={"allowed": ["not/any"]}) as service:
            key = await service.key(role="admin")
            async with service.client(key) as http:
                secret = key if kind == "key" else CARD
                for path, operations in service.app.openapi()["paths"].items():
                    if path == UNLOADS:
                        continue
                    for method in (*operations, "put", "brew"):
                        for url in {re.sub("{.*?}", where, path) for where in ("none", secret)}:
                            for request in misplaced(secret)[draw.randrange(every) :: every]:
                                reply = await http.request(method, url, **request)
                                assert reply.status_code < 500, (method, path, request)
                                if reply.status_code >= 400:
                                    refused += 1
                                    if secret in reply.text + str(dict(reply.headers)):
                                        repeated.append((method, path, request, reply.text))
                metrics = (await http.get("/metrics")).text
    finally:
        stop()

    assert [] == repeated
    assert refused > 1000 / every
    everything = metrics + "".join(capfd.readouterr()) + (tmp_path / "log").read_text()
    assert CARD not in everything
    assert key not in everything
    with sqlite3.connect(tmp_path / "service.db") as database:
        rows = str(database.execute("SELECT * FROM inference_log").fetchall())
    database.close()
    assert CARD not in rows
    assert key not in rows
