"""Adapters through the routes: who may load one, how requests name one, and what the lists say."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from msgspec import structs

from app.engine.adapter_source import AdapterFiles
from app.engine.base import Capabilities
from app.errors import ConfigError
from app.events import Event
from app.ipc.messages import AdapterLoaded
from app.requests import GenerationRequest
from app.types import Rights
from tests.unit.engine.test_adapter_source import make_adapter
from tests.web.harness import (
    BATCH,
    BODIES,
    CHAT,
    GENERATE,
    OPENAI_BODIES,
    RESPONSE_BODIES,
    OneKey,
    RecordingEngine,
    Web,
    is_envelope,
    make_web,
)

RIGHT = {**BODIES, "/v1/generate/batch": BATCH, **OPENAI_BODIES, **RESPONSE_BODIES}
every_route = pytest.mark.parametrize("path", RIGHT)


class AdaptedEngine(RecordingEngine):
    """Takes any adapter, whose digest is the name of its folder, and echoes as without one."""

    def __init__(self, model: str) -> None:
        super().__init__(model, capabilities=Capabilities(adapters=True))
        self.unloaded: list[str] = []
        self.named: list[tuple[str | None, str | None]] = []
        """Name and digest of the adapter of each request."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.named.append((request.adapter, request.adapter_digest))
        async with aclosing(super().stream(structs.replace(request, adapter=None))) as events:
            async for event in events:
                yield event

    async def load_adapter(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        return AdapterLoaded(1, files.folder, 4, 1000, "someone/base")

    def unload_adapter(self, digest: str) -> None:
        self.unloaded.append(digest)

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()


@pytest.fixture
def engine() -> AdaptedEngine:
    return AdaptedEngine("base")


@pytest.fixture
async def web(engine: AdaptedEngine, tmp_path: Any) -> Web:
    make_adapter(tmp_path / "team" / "a")
    roots = [str(tmp_path)]
    engines = {"base": engine, "plain": RecordingEngine("plain")}
    return await make_web(engines=engines, adapters={"roots": roots}, model={"roots": [str(tmp_path / "team")]})


async def load(web: Web, **fields: Any) -> Any:
    async with web.client() as client:
        return await client.post("/v1/adapters/load", json={"adapter_name": "mine", "source": "team/a", **fields})


async def test_a_loaded_adapter_is_listed_under_its_model(web: Web, tmp_path: Any):
    """With vLLM's `parent` and `root`; nobody is told where the roots are."""
    reply = await load(web)
    async with web.client() as client:
        listed = (await client.get("/v1/models")).json()["data"]
        card = (await client.get("/v1/models/mine")).json()

    expected = {"adapter_name": "mine", "state": "loaded", "model": "base", "source": "team/a", "digest": "team/a"}
    facts = {"rank": 4, "parameters": 1000, "trained_on": "someone/base", "problem": None}
    assert (200, {**expected, **facts}) == (
        reply.status_code,
        reply.json(),
    )
    assert [("base", None), ("plain", None), ("mine", "base")] == [(each["id"], each["parent"]) for each in listed]
    assert card == listed[-1]
    assert (card["root"], card["max_model_len"]) == ("team/a", listed[0]["max_model_len"])
    assert str(tmp_path) not in str(listed)


@every_route
async def test_a_request_names_an_adapter_as_its_model(web: Web, engine: AdaptedEngine, path: str):
    """On each route; the response names it, too."""
    await load(web)
    async with web.client() as client:
        reply = await client.post(path, json={**RIGHT[path], "model": "mine"})

    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["results"][0] if "results" in body else body)["model"] == "mine"
    assert engine.named == [("mine", "team/a")]


@pytest.mark.parametrize("path", [*RIGHT, "/generate", "/v1/stream"])
async def test_a_request_names_an_adapter_in_a_field_of_its_own(web: Web, engine: AdaptedEngine, path: str):
    """On each route that takes a model's name; what contradicts the model is refused, and so is a name of none."""
    await load(web)
    await load(web, adapter_name="second")
    body, model = RIGHT.get(path, GENERATE), "model_name" if path == "/generate" else "model"
    async with web.client() as client:

        async def send(**fields: Any) -> httpx.Response:
            headers = {"Cache-Control": "no-cache"}
            return await client.post(path, json={**body, **fields}, headers=headers)

        taken = [await send(adapter="mine", **named) for named in ({}, {model: "base"}, {model: "mine"})]
        by_model = await send(**{model: "mine"})
        refused = [await send(adapter="mine", **{model: name}) for name in ("plain", "second", "absent")]
        missing = await send(adapter="theirs")

    assert [200] * 4 == [reply.status_code for reply in (*taken, by_model)]
    assert engine.named == [("mine", "team/a")] * 4
    assert [400] * 3 == [reply.status_code for reply in refused]
    assert ["another model", "two different adapters", "another model"] == [
        next((words for words in ("another model", "two different adapters") if words in reply.text), "")
        for reply in refused
    ]
    assert all("adapter" in reply.text and is_envelope(reply) for reply in refused)
    assert 404 == missing.status_code
    # What a client sees does not depend on where it names the adapter.
    assert [shape(by_model)] * 3 == [shape(reply) for reply in taken]


def shape(reply: httpx.Response) -> str:
    """Return the body of a response without what is new in each."""
    return re.sub(r'"([a-z_]*id|created|created_at|completed_at|[a-z_]*time[a-z_]*)":("[^"]*"|[0-9.]+)', "", reply.text)


async def test_the_model_and_its_adapters_share_no_cached_response(web: Web, engine: AdaptedEngine, tmp_path: Any):
    """Nor do two adapters that have one name after the other."""
    make_adapter(tmp_path / "b")
    await load(web)
    async with web.client() as client:

        async def cached(model: str) -> bool:
            body = {"prompt": "hello", "temperature": 0, "model": model}
            return bool((await client.post("/v1/generate", json=body)).json()["cached"])

        assert [False, False, True, True] == [await cached(model) for model in ("base", "mine", "base", "mine")]
        gone = await client.post("/v1/adapters/unload", json={"adapter_name": "mine"})
        assert (200, "unloaded") == (gone.status_code, gone.json()["state"])
        await load(web, source="b")
        assert [False, True] == [await cached("mine"), await cached("mine")]
    assert ["team/a"] == engine.unloaded


async def test_only_keys_that_may_load_models_load_and_unload_adapters(web: Web, engine: AdaptedEngine):
    """Admins among them."""
    keys = web.container.keys
    assert isinstance(keys, OneKey)
    keys.rights = Rights()
    refused = await load(web)
    keys.rights = Rights(load_models=True)
    taken = await load(web)
    keys.rights = Rights(manage_keys=True)
    by_admin = await load(web, adapter_name="other")
    keys.rights = Rights()
    async with web.client() as client:
        unchanged = await client.post("/v1/adapters/unload", json={"adapter_name": "mine"})

    assert [403, 200, 200, 403] == [reply.status_code for reply in (refused, taken, by_admin, unchanged)]
    assert refused.json()["error"] == "forbidden"
    assert not engine.unloaded


async def test_a_role_for_some_models_uses_an_adapter_only_if_it_names_it(web: Web):
    """The right to its base model is not enough: an adapter may be another customer's."""
    await load(web)
    keys = web.container.keys
    assert isinstance(keys, OneKey)
    statuses = []
    for models in (("base",), ("mine",), ("base", "mine")):
        keys.rights = Rights(models=models)
        async with web.client() as client:
            for fields in ({"model": "mine"}, {"adapter": "mine"}, {"model": "base"}):
                statuses.append((await client.post("/v1/generate", json={"prompt": "a", **fields})).status_code)

    assert statuses == [403, 403, 200, 200, 200, 403, 200, 200, 200]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"source": "../team/a"}, 400, "must not hold"),
        ({"source": "/etc"}, 400, "below adapters.roots"),
        ({"source": "https://example.com/adapter"}, 400, "below adapters.roots"),
        ({"trust_remote_code": True}, 400, "trust_remote_code"),
        ({"model": "plain"}, 400, "takes no adapters"),
        ({"model": "absent"}, 404, "not loaded"),
        ({"adapter_name": "plain"}, 409, "has this name"),
        ({"adapter_name": "a b"}, 400, "adapter_name"),
        ({"adapter_name": "../x"}, 400, "adapter_name"),
        ({"scale": 2}, 400, "scale"),
    ],
)
async def test_a_load_that_cannot_be_says_why(web: Web, fields: dict[str, Any], status: int, words: str):
    reply = await load(web, **fields)

    assert status == reply.status_code
    assert words in reply.text


async def test_adapters_are_listed_for_those_who_may_load_them(web: Web):
    await load(web)
    keys = web.container.keys
    assert isinstance(keys, OneKey)
    replies = []
    for rights in (Rights(load_models=True), Rights()):
        keys.rights = rights
        async with web.client() as client:
            replies.append(await client.get("/v1/adapters"))

    assert [200, 403] == [reply.status_code for reply in replies]
    assert [("mine", "loaded", "base")] == [
        (each["adapter_name"], each["state"], each["model"]) for each in replies[0].json()["adapters"]
    ]


async def test_a_configured_adapter_is_listed_before_it_is_loaded_and_503_until_then(
    engine: AdaptedEngine, tmp_path: Any
):
    """Nobody is told where its folder is."""
    make_adapter(tmp_path / "a")
    preload = [{"name": "mine", "source": str(tmp_path / "a")}]
    web = await make_web(engines={"base": engine}, adapters={"preload": preload})
    path, body = "/v1/chat/completions", {**CHAT, "model": "mine"}
    async with web.client() as client:
        early = await client.post(path, json=body)
        before = (await client.get("/v1/models")).json()["data"]
        await web.host.load_adapters()
        later = await client.post(path, json=body)
        listed = (await client.get("/v1/adapters")).json()["adapters"]

    assert ((503, "2"), 200) == ((early.status_code, early.headers["retry-after"]), later.status_code)
    assert ["base", "mine"] == [card["id"] for card in before]
    assert ("mine", "loaded") == (listed[0]["adapter_name"], listed[0]["state"])
    assert str(tmp_path) not in str([before, listed])


@pytest.mark.parametrize(
    ("preload", "words"),
    [
        ([{"name": "base", "source": "a"}], "name of a model"),
        ([{"name": "mine", "source": "a", "model": "absent"}], "no model of the name absent"),
        ([{"name": "mine", "source": "a"}, {"name": "mine", "source": "b"}], "two adapters of one name"),
        ([{"name": "../x", "source": "a"}], "name"),
    ],
)
async def test_a_configured_adapter_that_cannot_be_ends_the_start(
    engine: AdaptedEngine, preload: list[dict[str, str]], words: str
):
    with pytest.raises(ConfigError, match=words):
        await make_web(engines={"base": engine}, adapters={"preload": preload})


async def test_texts_are_not_embedded_with_an_adapter(web: Web):
    await load(web)
    async with web.client() as client:
        reply = await client.post("/v1/embeddings", json={"input": "hello", "model": "mine"})

    assert reply.status_code == 400
    assert "names an adapter" in reply.text


async def test_an_adapter_that_is_not_loaded_cannot_be_unloaded(web: Web):
    async with web.client() as client:
        reply = await client.post("/v1/adapters/unload", json={"adapter_name": "mine"})

    assert (404, "not_found") == (reply.status_code, reply.json()["error"])


async def test_no_model_is_loaded_under_the_name_of_an_adapter(web: Web, tmp_path: Any):
    await load(web)
    async with web.client() as client:
        body = {"model_name": "a", "served_name": "mine", "source": "local"}
        reply = await client.post("/v1/models/load", json=body)

    assert (409, "conflict") == (reply.status_code, reply.json()["error"])
