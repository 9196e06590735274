"""Real workers come and go in one running application: loaded from folders and from a hub, replaced, unloaded."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from app.engine import partial_downloads
from tests.e2e.fake_hub import COMMIT, FakeHub, serving
from tests.unit.tiny_encoders import SIZE, save_tiny_bert, save_tiny_encoder
from tests.unit.tiny_models import save_tiny_llama
from tests.waiting import START_SECONDS
from tests.web.access import Running, running
from tests.web.harness import frames

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

LOAD, UNLOAD = "/v1/models/load", "/v1/models/unload"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    for name in ("one", "two", "hub"):
        save_tiny_llama(folder / "roots" / name, max_position_embeddings=100_000)
    save_tiny_encoder(folder / "roots" / "encoder")
    save_tiny_bert(folder / "hub-encoder")
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[FakeHub]:
    """A hub that the workers know by their environment, with a model that is gated."""
    models = dict.fromkeys(("org/gated", "org/slow"), folder / "roots" / "hub")
    models["org/encoder"] = folder / "hub-encoder"
    fake = FakeHub(models, gated={"org/gated": "hf_right", "org/encoder": "hf_right"}, slow={"org/slow"})
    with serving(fake) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(partial_downloads, "hub_cache", lambda: folder / "cache")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(folder: Path, hub: FakeHub) -> AsyncIterator[Running]:
    model = {
        "engine": "serial",
        "preload": False,
        "required": False,
        "roots": [str(folder / "roots")],
        "threads": 1,
        "compile": "none",
    }
    async with running(folder / "data", model=model) as app:
        yield app


@pytest_asyncio.fixture(loop_scope="module")
async def client(app: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with app.client() as client:
        yield client


def workers() -> set[int]:
    """Return the processes that are, or were started to be, a worker."""
    return {child.pid for child in psutil.Process().children() if "app.worker" in child.cmdline()}


async def state(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    models: list[dict[str, Any]] = (await client.get("/status")).json()["models"]
    return next(model for model in models if model["name"] == name)


async def generate(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    body = {"prompt": "hello", "model": model, "max_tokens": 3, "temperature": 0, "cache": False, **fields}
    return await client.post("/v1/generate", json=body)


async def test_ten_loads_of_one_model_are_one_process_and_delay_nobody(client: httpx.AsyncClient):
    """The progress is events while probes are answered as fast as ever."""
    body = {"model_name": "one", "source": "local"}
    before, slowest = workers(), 0.0
    streaming = asyncio.create_task(client.post(LOAD, json={**body, "stream": True}))
    loading = [asyncio.create_task(client.post(LOAD, json=body)) for _ in range(10)]
    while not all(task.done() for task in loading):
        started = time.monotonic()
        health = await client.get("/health")
        slowest = max(slowest, time.monotonic() - started)
        assert 200 == health.status_code
        await asyncio.sleep(0.01)
    replies = [task.result() for task in loading]
    events = [(name, json.loads(data)) for name, data in frames((await streaming).text)]

    assert {(200, "ready")} == {(reply.status_code, reply.json()["state"]) for reply in replies}
    assert "done" == events[-1][0]
    stages = [data["stage"] for name, data in events if name == "progress"]
    # A stage that is over before anybody looks is not told.
    known = {"waiting", "process", "files", "tokenizer", "weights", "layers", "first token", "ready"}
    assert {"process"} <= {*stages} <= known
    assert 200 == (await generate(client, "one")).status_code
    # The other one, if there is one, is the spare that waits for a worker to die.
    assert 1 <= len(workers() - before) <= 2
    assert slowest < 5


async def test_a_model_is_replaced_without_a_failed_request(client: httpx.AsyncClient):
    old, statuses, stop = (await state(client, "one"))["requests"], [], asyncio.Event()

    async def send() -> None:
        while not stop.is_set():
            statuses.append((await generate(client, "one", max_tokens=5)).status_code)
            await asyncio.sleep(0.02)  # the new worker starts on the same processor

    sending = [asyncio.create_task(send()) for _ in range(3)]
    body = {"model_name": "two", "source": "local", "served_name": "one", "replace": True}
    replaced = await client.post(LOAD, json=body)
    stop.set()
    await asyncio.gather(*sending)

    assert 200 == replaced.status_code, replaced.text
    assert {200} == set(statuses)
    assert len(statuses) > 3
    assert old > 0


async def test_an_unloaded_model_gives_its_memory_back(client: httpx.AsyncClient, app: Running):
    """What still runs after the grace period ends with a last event; the process is gone."""
    pid = app.container.host.find_generating("one").engine.status().worker_pid
    assert pid is not None
    running = asyncio.create_task(generate(client, "one", max_tokens=90_000, stream=True, ignore_eos=True))
    while not app.container.host.find("one").engine.status().running:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.01)
    unloaded = await client.post(UNLOAD, json={"model_name": "one", "grace_seconds": 0.1})
    ended = frames((await running).text)

    assert "unloaded" == unloaded.json()["state"]
    assert not psutil.pid_exists(pid)
    assert ended[-1][0] in ("done", "error")
    assert 404 == (await generate(client, "one")).status_code


async def test_a_load_that_fails_says_why_and_leaves_no_process(client: httpx.AsyncClient, folder: Path):
    """Nor series of its name in the metrics."""
    weights = save_tiny_llama(folder / "roots" / "pickled") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    before = workers()
    failed = await client.post(LOAD, json={"model_name": "pickled", "source": "local"})
    now = await state(client, "pickled")
    figures = (await client.get("/metrics")).text

    assert (424, "unsupported") == (failed.status_code, failed.json()["details"]["reason"]), failed.text
    assert "safetensors" in failed.json()["message"]
    assert workers() <= before
    assert "pickled" not in figures
    assert ("failed", "unsupported") == (now["state"], now["error_reason"])


async def test_a_load_that_is_ended_in_its_download_leaves_nothing(
    client: httpx.AsyncClient, hub: FakeHub, folder: Path
):
    before = workers()
    loading = asyncio.create_task(client.post(LOAD, json={"model_name": "org/slow", "source": "hub"}))
    assert await asyncio.to_thread(hub.halted.wait, 100)
    while not (part := list((folder / "cache").rglob("*.incomplete"))):  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.02)
    async with asyncio.timeout(START_SECONDS):
        while (progress := (await state(client, "org/slow"))["progress"])["bytes_total"] is None:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.02)
    ended = await client.post(UNLOAD, json={"model_name": "org/slow"})

    assert "files" == progress["stage"]
    assert 0 < progress["bytes_done"] <= progress["bytes_total"]
    assert (409, 200) == ((await loading).status_code, ended.status_code)
    assert not part[0].exists()
    assert [] == list((folder / "cache").rglob("*.incomplete"))
    assert workers() <= before


async def test_a_gated_model_is_loaded_with_a_token_that_is_used_once(
    client: httpx.AsyncClient, app: Running, hub: FakeHub
):
    """It stands in no environment and on no command line, and the worker that replaces a dead one does without it."""
    body = {"model_name": "org/gated", "source": "hub", "revision": COMMIT}
    refused = await client.post(LOAD, json=body)
    loading = await client.post(LOAD, json={**body, "hf_token": "hf_right", "stream": True})
    events = [json.loads(data) for name, data in frames(loading.text)]
    engine = app.container.host.find("org/gated").engine
    worker = psutil.Process(engine.status().worker_pid)
    shown = [*worker.cmdline(), *worker.environ().values()]
    used = len(hub.authorizations)
    worker.kill()
    while engine.status().restarts < 1 or engine.status().state.value != "ready":  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.05)

    assert (424, "gated") == (refused.status_code, refused.json()["details"]["reason"])
    assert ("ready", COMMIT) == (events[-1]["state"], events[-1]["revision"]), events[-1]
    assert {"Bearer hf_right"} == set(hub.authorizations)
    assert not any("hf_right" in text for text in shown)
    assert used == len(hub.authorizations)
    assert 200 == (await generate(client, "org/gated")).status_code
    await client.post(UNLOAD, json={"model_name": "org/gated"})


@pytest.mark.parametrize(
    "body",
    [
        {"model_name": "encoder", "source": "local"},
        {"model_name": "org/encoder", "source": "hub", "task": "embed", "hf_token": "hf_right"},
    ],
)
async def test_an_encoder_is_loaded_embeds_and_is_unloaded(
    client: httpx.AsyncClient, app: Running, body: dict[str, Any]
):
    """As any other model: chosen by its name, listed with what it does, and its process is gone afterwards."""
    name = body["model_name"]
    loaded = await client.post(LOAD, json=body)
    vectors = await client.post("/v1/embeddings", json={"input": ["the cat", "a dog"], "model": name})
    wrong = await generate(client, name)
    pid = app.container.host.find(name).engine.status().worker_pid
    unloaded = await client.post(UNLOAD, json={"model_name": name})
    after = await client.post("/v1/embeddings", json={"input": "the cat", "model": name})

    assert (200, "embed", "ready") == (loaded.status_code, loaded.json().get("task"), loaded.json().get("state"))
    assert (200, name) == (vectors.status_code, vectors.json().get("model")), vectors.text
    assert [SIZE, SIZE] == [len(each["embedding"]) for each in vectors.json()["data"]]
    assert (400, "only embeds" in wrong.text) == (wrong.status_code, True)
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert ("unloaded", 404) == (unloaded.json()["state"], after.status_code)


async def test_the_list_of_models_is_whole_while_one_is_unloaded(client: httpx.AsyncClient):
    """Whoever asks gets 200 with all the others, and of the one that goes its card or 404."""
    for name in ("one", "two"):
        await client.post(LOAD, json={"model_name": name, "source": "local"})
    unloading = asyncio.create_task(client.post(UNLOAD, json={"model_name": "one"}))
    lists, cards = [], []
    while not unloading.done():
        lists.append(await client.get("/v1/models"))
        cards.append(await client.get("/v1/models/one"))
        await asyncio.sleep(0.005)

    assert 200 == (await unloading).status_code
    assert len(lists) > 3
    assert {200} == {reply.status_code for reply in lists}
    assert all("two" in {card["id"] for card in reply.json()["data"]} for reply in lists)
    assert {200, 404} >= {reply.status_code for reply in cards}
    await client.post(UNLOAD, json={"model_name": "two"})
