"""A Prometheus of the tests' own, from the machine's program: a folder and a port of its own, gone at the end."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.ports import NO_TLS, free_port

SCRAPE_SECONDS = 0.25


def program(name: str = "prometheus") -> str | None:
    """Return the path of a program of Prometheus; None where the machine has none."""
    return shutil.which(name)


@dataclass(frozen=True)
class PrometheusServer:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression now.  Raises: AssertionError: it cannot be evaluated."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, verify=NO_TLS).json()
        assert "success" == answer["status"], (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@contextmanager
def running(program: str, target: str) -> Iterator[PrometheusServer]:
    """Scrape a service until the block ends.  Args: target: its host and port."""
    folder = Path(tempfile.mkdtemp(prefix="llm-prometheus-"))
    port = free_port()
    job = {"job_name": "llm-service", "static_configs": [{"targets": [target]}]}
    timing = {"scrape_interval": f"{SCRAPE_SECONDS * 1000:.0f}ms", "scrape_timeout": f"{SCRAPE_SECONDS * 1000:.0f}ms"}
    # JSON is YAML, too.
    (folder / "prometheus.yml").write_text(json.dumps({"global": timing, "scrape_configs": [job]}))
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *options, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder, stdout=log, stderr=log
        )
    try:
        server = PrometheusServer(f"http://127.0.0.1:{port}")
        _wait(server, process, folder / "log")
        yield server
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: PrometheusServer, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(400):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/-/ready", verify=NO_TLS).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise TimeoutError(log.read_text())
