"""An MLflow server of the tests' own, in an environment of its own: `make mlflow-server` installs that once."""

import json
import os
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.clients.environments import Client, installed, is_installed
from tests.ports import free_port
from tests.waiting import START_SECONDS

ROOT = Path(__file__).parents[2]
MLFLOW = Client("log_models.py", ("mlflow==3.17.2",))
_numbers = count(1)


@dataclass
class MlflowServer:
    """A started server, and what its registry is made to say."""

    address: str
    folder: Path
    process: subprocess.Popen[bytes]
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=f"{self.address}/api/2.0/mlflow/", timeout=30)

    @cached_property
    def logged(self) -> Mapping[str, str]:
        """Log the embedded model, and others like it: what they are -> where their files are, and their run."""
        program = ROOT / "tests" / "services" / "programs" / "log_models.py"
        python = installed(MLFLOW) / "bin" / "python"
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        command = [str(python), str(program), self.address, str(ROOT / "models" / "tiny-chat"), *packages]
        output = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=START_SECONDS)
        assert output.returncode == 0, output.stderr
        found: Mapping[str, str] = json.loads(output.stdout.splitlines()[-1])
        return found

    def create(self) -> str:
        """Register a model without versions and return its name."""
        name = f"chat-{next(_numbers)}"
        self._post("registered-models/create", name=name)
        return name

    def register(self, name: str, what: str, **tags: str) -> str:
        """Add a version to a model and return its number."""
        source, run_id = self.logged[what].split()
        labels = [{"key": key, "value": value} for key, value in tags.items()]
        origin = {"source": source, "model_id": source.removeprefix("models:/"), "run_id": run_id}
        version = self._post("model-versions/create", name=name, tags=labels, **origin)
        return str(version["model_version"]["version"])

    def point(self, name: str, alias: str, version: str) -> None:
        """Let an alias mean a version."""
        self._post("registered-models/alias", name=name, alias=alias, version=version)

    def move(self, name: str, version: str, stage: str) -> None:
        """Put a version into a stage."""
        options = {"version": version, "stage": stage, "archive_existing_versions": False}
        self._post("model-versions/transition-stage", name=name, **options)

    def _post(self, path: str, **body: Any) -> Mapping[str, Any]:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        content: Mapping[str, Any] = reply.json()
        return content

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let it accept connections and answer nothing while the block runs."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.http.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def wait(self) -> None:
        for _ in range(int(10 * START_SECONDS)):
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise TimeoutError((self.folder / "log").read_text())


@contextmanager
def running() -> Iterator[MlflowServer]:
    """Start a new server with an empty database and throw it away at the end."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="llm-mlflow-") as name, (Path(name) / "log").open("wb") as log:
        folder = Path(name)
        process = subprocess.Popen(
            [
                *(str(installed(MLFLOW) / "bin" / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)),
                *(
                    "--backend-store-uri",
                    f"sqlite:///{folder}/db",
                    "--artifacts-destination",
                    str(folder / "artifacts"),
                ),
                *("--workers", "1"),
            ],
            cwd=folder,
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        server = MlflowServer(f"http://127.0.0.1:{port}", folder, process)
        try:
            server.wait()
            yield server
        finally:
            server.stop()


def has_server() -> bool:
    """Return whether the environment of the server is installed."""
    return is_installed(MLFLOW)


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    return inherited | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    print(f"MLflow is in {installed(MLFLOW)}")  # noqa: T201
