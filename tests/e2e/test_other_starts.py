"""Other ways to start the service than `python -m app serve`, as the documents of older services have them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import KEY, ROOT, environment
from tests.ports import NO_TLS, free_port
from tests.waiting import HANG_SECONDS, START_SECONDS, wait_for

pytestmark = pytest.mark.e2e


@contextmanager
def uvicorn(folder: Path, *arguments: str, **settings: str) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """Run `uvicorn app.main:app` in a folder, and yield its address, its log and its process."""
    with started(folder, ["-m", "uvicorn", "app.main:app", *arguments], None, **settings) as service:
        yield service


@contextmanager
def started(
    folder: Path, arguments: list[str], cwd: Path | None, **settings: str
) -> Iterator[tuple[str, Path, subprocess.Popen[str]]]:
    """Run Python with these arguments, and a port."""
    port, log = free_port(), folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port)],
            cwd=cwd or folder,
            env=environment(folder / "data", API_KEY=KEY, **settings),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", log, process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(HANG_SECONDS)


def answers(url: str, path: str = "/readyz") -> bool:
    try:
        return httpx.get(f"{url}{path}", verify=NO_TLS).status_code == 200
    except httpx.TransportError:
        return False


def test_uvicorn_starts_the_whole_service_and_stops_it(tmp_path: Path):
    """A request that runs when the signal comes is answered."""
    with uvicorn(tmp_path, "--host", "127.0.0.1", MODEL__COMPILE="none") as (url, log, process):
        wait_for(lambda: answers(url), START_SECONDS)
        reply = httpx.post(
            f"{url}/v1/generate",
            json={"prompt": "Hello, world!", "max_new_tokens": 8},
            headers={"X-API-Key": KEY},
            timeout=30,
        )
        process.send_signal(signal.SIGTERM)
        code = process.wait(HANG_SECONDS)

    assert (200, True) == (reply.status_code, reply.json()["tokens_generated"] > 0), log.read_text()
    # uvicorn raises the signal again once it has shut down.
    assert code in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()


@pytest.mark.soak
def test_uvicorn_loads_the_service_again_when_its_code_changes(tmp_path: Path):
    watched = tmp_path / "code" / "changed.py"
    watched.parent.mkdir()
    watched.write_text("")
    settings = {"MODEL__ENGINE": "echo"}
    with uvicorn(tmp_path, "--reload", "--reload-dir", str(watched.parent), **settings) as (url, log, process):
        wait_for(lambda: answers(url), START_SECONDS)
        time.sleep(1)  # until its present state is known
        watched.write_text("changed = True")
        wait_for(lambda: "Reloading" in log.read_text())
        wait_for(lambda: log.read_text().count("Started server process") == 2 and answers(url), START_SECONDS)
        process.send_signal(signal.SIGTERM)
        process.wait(HANG_SECONDS)


def test_uvicorn_says_in_one_line_what_is_wrong_with_the_configuration(tmp_path: Path):
    with uvicorn(tmp_path, MODEL__NAME="/nowhere") as (_, log, process):
        code = process.wait(HANG_SECONDS)

    assert code != 0
    reason = "there is no folder /nowhere; a model of the hub needs source: hub"
    assert f"llm-service: configuration: model.name: {reason}" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["start_api.py", "--log-level", "INFO"], ROOT / "serving"),
        (["-m", "serving.api.main"], None),
        (["-m", "uvicorn", "serving.api.main:app", "--host", "127.0.0.1"], None),
    ],
    ids=["start_api.py", "module", "uvicorn"],
)
def test_the_commands_of_an_older_service_start_this_one(arguments: list[str], folder: Path | None, tmp_path: Path):
    """With the key of its variable; a signal ends it."""
    with started(tmp_path, arguments, folder, MODEL__ENGINE="echo") as (url, log, process):
        wait_for(lambda: answers(url), START_SECONDS)
        reply = httpx.post(f"{url}/predict", json={"prompt": "Hello"}, headers={"Authorization": f"Bearer {KEY}"})
        process.send_signal(signal.SIGTERM)
        code = process.wait(HANG_SECONDS)

    assert (200, "Hello") == (reply.status_code, reply.json()["generated_text"]), log.read_text()
    assert code in (0, -signal.SIGTERM)
