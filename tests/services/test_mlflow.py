"""Models from a real MLflow server: served, followed by their alias while requests run, and refused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.services.mlflow_server import MlflowServer
from tests.services.process import ROOT, ServiceProcess, serving
from tests.waiting import START_SECONDS

# The server's first start and the logging of five models take most of it.
pytestmark = [pytest.mark.services, pytest.mark.soak, pytest.mark.timeout(400)]

PROMPT = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 8,
}


def settings(server: MlflowServer, uri: str) -> dict[str, Any]:
    return {
        "MODEL__ENGINE": "auto",
        "MODEL__SOURCE": "mlflow",
        "MODEL__NAME": uri,
        "MODEL__COMPILE": "none",
        "MODEL__SPARE_WORKER": "false",
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "canary-password",
        "MLFLOW__POLL_SECONDS": "0.3",
        "CACHE__ENABLED": "false",
        "OMP_NUM_THREADS": "1",
    }


async def model_info(http: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await http.get("/info")).json()["models"][0]
    return found


async def until(http: httpx.AsyncClient, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until /info says so of the model, and return what it says."""
    async with asyncio.timeout(START_SECONDS):
        while not wanted(found := await model_info(http)):  # noqa: ASYNC110  # another process' work
            await asyncio.sleep(0.2)
    return found


def workers(service: ServiceProcess) -> list[int]:
    """Return the processes of models and of downloads."""
    found = []
    for child in psutil.Process(service.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if {"app.worker", "app.registry.download_process"} & {*child.cmdline()}:
                found.append(child.pid)
    return found


async def chat(http: httpx.AsyncClient) -> str:
    reply = await http.post("/v1/chat", json=PROMPT)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["message"]["content"]
    return text


@asynccontextmanager
async def traffic(http: httpx.AsyncClient, callers: int) -> AsyncIterator[list[tuple[int, str]]]:
    """Let callers chat one after the other, without a pause, as streams and not, while the block runs.

    Yields the status and text of each reply; the status of a stream that failed later is 0.
    """
    replies: list[tuple[int, str]] = []
    over = asyncio.Event()

    async def call(stream: bool) -> None:
        while not over.is_set():
            reply = await http.post("/v1/chat", json=PROMPT | {"stream": stream})
            failed = stream and "event: done" not in reply.text
            replies.append((0 if failed else reply.status_code, reply.text))

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(call(bool(number % 2)))
        try:
            yield replies
        finally:
            over.set()


async def test_an_alias_is_followed_without_a_failed_request_and_a_broken_version_stays_out(
    mlflow: MlflowServer, tmp_path: Path
):
    """Requests run all the time, over the switch and over a version that cannot be loaded.

    At the next start the registry does not answer, and the version that served last does.
    """
    name = mlflow.create()
    first = mlflow.register(name, "model", team="search")
    mlflow.point(name, "production", first)

    configured = settings(mlflow, f"models:/{name}@production")
    async with serving(None, tmp_path, **configured) as service, service.client() as http:
        served = await model_info(http)
        assert (name, "ready") == (served["name"], served["state"])
        registry = served["registry"]
        assert (name, first, "production") == (registry["name"], registry["version"], registry["alias"])
        assert mlflow.logged["model"].split()[1] == registry["run_id"]
        assert {"accuracy": 0.75, "loss": 1.5} == registry["metrics"]
        assert {"team": "search"} == registry["tags"]
        assert registry["digest"].startswith("sha256:")
        before = await chat(http)
        old_workers = workers(service)
        async with traffic(http, 3) as replies:
            second = mlflow.register(name, "variant")
            mlflow.point(name, "production", second)
            await until(http, lambda model: model["registry"]["version"] == second)
            after = await chat(http)
            assert before != after

            third = mlflow.register(name, "broken")
            mlflow.point(name, "production", third)
            refused = await until(http, lambda model: model["registry"]["refused_version"] == third)
            assert second == refused["registry"]["version"]
            [reported] = (await http.get("/status")).json()["models"]
            assert "The model cannot be loaded" in reported["last_error"]
            assert after == await chat(http)

            async with asyncio.timeout(START_SECONDS):
                while len(workers(service)) > 1:  # noqa: ASYNC110  # another process' work
                    await asyncio.sleep(0.2)

        assert [200] * len(replies) == [status for status, _ in replies], replies
        assert 20 < len(replies)
        assert not {*old_workers} & {*workers(service)}
        [registry_folder] = (tmp_path / "data" / "registry").iterdir()
        assert [second] == [path.name for path in (registry_folder / name).iterdir() if path.is_dir()]

    with mlflow.stalled():
        configured["MLFLOW__TIMEOUT_SECONDS"] = "1"
        async with serving(None, tmp_path, **configured) as service, service.client() as http:
            assert second == (await model_info(http))["registry"]["version"]
            assert after == await chat(http)

    assert "canary-password" not in service.output.read_text()


async def test_a_model_comes_at_run_time_and_one_that_needs_code_is_refused(mlflow: MlflowServer, tmp_path: Path):
    """The reason is named, and neither a process nor a file is left of it."""
    name = mlflow.create()
    refused = {
        mlflow.register(name, "with code"): "brings Python code, which is never run",
        mlflow.register(name, "pickled"): "only the flavor transformers is loaded; this model has 'python_function'",
        "99": f"the registry has no models:/{name}/99",
    }
    version = mlflow.register(name, "model")
    configured = settings(mlflow, str(ROOT / "models" / "tiny-chat")) | {"MODEL__SOURCE": "local"}

    async with serving(None, tmp_path, **configured) as service, service.client() as http:
        for number, words in refused.items():
            body = {"model_name": f"models:/{name}/{number}", "source": "mlflow"}
            reply = await http.post("/v1/models/load", json=body)
            assert 424 == reply.status_code, reply.text
            assert words in reply.json()["message"]
        assert 1 == len(workers(service))
        assert [] == [*(tmp_path / "data" / "registry").glob("*/*/*")]

        mlflow.move(name, version, "Production")
        body = {"model_name": f"models:/{name}/Production", "source": "mlflow"}
        loaded = await http.post("/v1/models/load", json=body)
        assert (200, name) == (loaded.status_code, loaded.json()["name"])
        reply = await http.post("/v1/chat", json=PROMPT | {"model": name})
        assert 200 == reply.status_code, reply.text
