"""A real service: its own process, a real socket, the embedded model."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from app.worker.execution.native.native_build import kernels_digest
from tests.ports import free_port
from tests.waiting import HANG_SECONDS, START_SECONDS, wait_for

ROOT = Path(__file__).parents[2]
KEY = "e2e-key-0123456789"


@dataclass
class Service:
    """A running `python -m app serve` and a client that holds its key."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client
    log: Path

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.client.get(path, **kwargs)

    def chat(self, text: str, **fields: Any) -> dict[str, Any]:
        """Send one user message greedily and return the whole reply."""
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        reply = self.client.post("/v1/chat", json=body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def engine(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("/status").json()["engine"]
        return status

    def worker(self) -> psutil.Process:
        return psutil.Process(self.engine()["worker_pid"])

    def logged(self, text: str) -> int:
        """Return how often the log says this; waits for the first time, since a thread writes the lines later."""
        wait_for(lambda: text in self.log.read_text())
        return self.log.read_text().count(text)

    def stop(self, seconds: float = 60) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


Start = Callable[..., Service]


def ready(service: Service) -> bool:
    assert service.process.poll() is None, service.log.read_text()
    try:
        return service.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def environment(data_dir: Path, **settings: str) -> dict[str, str]:
    """Return this machine's environment without settings of its own, and with these.

    The service is started in a folder of its own, so that no .env or config.yml of a developer changes what is tested.
    """
    inherited = {name: value for name, value in os.environ.items() if "__" not in name}
    ours = {
        "PYTHONPATH": str(ROOT),
        "APP__DATA_DIR": str(data_dir),
        "APP__PROMPTS_DIR": str(ROOT / "prompts"),
        "MODEL__NAME": str(ROOT / "models" / "tiny-chat"),
        # Two services are tested at once; threads that wait for each other on shared cores would make both crawl.
        "MODEL__THREADS": "1",
        # Nor should the imports of a process that few tests need.
        "MODEL__SPARE_WORKER": "false",
    }
    return {**inherited, **ours, **settings}


def serve(port: int) -> list[str]:
    """Return the command that serves on this port."""
    return [sys.executable, "-m", "app", "serve", "--port", str(port)]


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where services find the kernels that others of them compiled, in this run or an earlier one.

    A library is named for its source, compiler and flags; a folder for the sources, so that it holds no older ones.
    """
    if (cache := getattr(request.config, "cache", None)) is not None:
        return Path(cache.mkdir(f"compiled-{kernels_digest()}"))
    return tmp_path_factory.mktemp("compiled")


def take_over(libraries: Path, folder: Path) -> None:
    """Copy the libraries that a folder lacks; one is there whole or not at all."""
    for library in libraries.glob("*.so"):
        if not (folder / library.name).exists():
            part = folder / f"{library.name}.{os.getpid()}"
            shutil.copy(library, part)
            part.replace(folder / library.name)


@contextmanager
def starting(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Start]:
    """Lend a function that starts a service with settings given as SECTION__KEY; all are stopped at the end."""
    services: list[Service] = []

    def start(*, wait: bool = True, command: Sequence[str] = (), **settings: str) -> Service:
        """Args: command: a program that runs the one named after it, such as a shell that sets limits first."""
        folder = tmp_path_factory.mktemp("service")
        own = folder / "data" / "compiled"
        own.mkdir(mode=0o700, parents=True)
        take_over(compiled, own)
        port = free_port()
        given = {"SECURITY__API_KEY": KEY, "RATE_LIMIT__ENABLED": "false", **settings}
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *serve(port)],
                cwd=folder,
                env=environment(folder / "data", **given),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=url, headers={"X-API-Key": given["SECURITY__API_KEY"]}, timeout=START_SECONDS)
        service = Service(process, url, client, log)
        services.append(service)
        if wait:
            wait_for(lambda: ready(service), START_SECONDS)
            take_over(own, compiled)
        return service

    try:
        yield start
    finally:
        for service in services:
            service.client.close()
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait(HANG_SECONDS)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Start]:
    """Start services of a module's own: idle ones would take memory, and time of the processor, until the end."""
    with starting(tmp_path_factory, compiled) as start:
        yield start


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Iterator[Service]:
    """The embedded model, shared by the tests that leave it as they found it."""
    with starting(tmp_path_factory, compiled) as start:
        yield start()
