"""Real servers with a small model, and the service in front of each as a process of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bench.peers import Setup, TransformersServe, Vllm
from bench.process import Server, free_port, serving
from tests.e2e.conftest import ROOT, Service, Start, compiled, start
from tests.upstreams import environments

__all__ = ["compiled", "start"]

READY_SECONDS = 1200.0
"""vLLM's imports alone take minutes on a busy machine."""
VLLM_OPTIONS = (
    *("--served-model-name", "there", "--max-model-len", "512", "--enforce-eager"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--api-key", "upstream-key-1234"),
)
UPSTREAM_KEY = "upstream-key-1234"
TINY = ROOT / "models" / "tiny-chat"
Count = Callable[..., float]


def setup_of(folder: Path, model: Path, **facts: Path) -> Setup:
    return Setup(model=model, dtype="float32", threads=1, folder=folder, system="", **facts)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """vLLM with a Llama of random weights, whose tokenizer has made-up words."""
    folder = tmp_path_factory.mktemp("vllm")
    model = folder / "model"
    subprocess.run([sys.executable, "-m", "bench.model", str(model), "--shape", "tiny"], cwd=ROOT, check=True)
    setup, peer, port = setup_of(folder, model, vllm=environments.vllm()), Vllm(), free_port()
    environment = {**peer.environment(setup), "VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1"}
    command = [*peer.command(setup, port), *VLLM_OPTIONS]
    with serving(command, port, environment, "/health", folder / "log", READY_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def before_vllm(vllm: Server, start: Start) -> Service:
    """The service in front of vLLM."""
    return in_front(start, vllm.port, REMOTE__API_KEY=UPSTREAM_KEY)


@pytest.fixture(scope="session")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve` with the embedded model."""
    folder, port, peer = tmp_path_factory.mktemp("transformers"), free_port(), TransformersServe()
    setup = setup_of(folder, TINY)
    command, environment = peer.command(setup, port), peer.environment(setup)
    with serving(command, port, environment, "/health", folder / "log", READY_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def before_transformers(transformers: Server, start: Start) -> Service:
    """The service in front of `transformers serve`."""
    remote = {"REMOTE__SERVER": "transformers", "REMOTE__MODEL": str(TINY), "REMOTE__TOKENIZER": str(TINY)}
    return in_front(start, transformers.port, MODEL__MAX_MODEL_LEN="2048", **remote)


def in_front(start: Start, *ports: int, **settings: str) -> Service:
    """Start a service whose model is on other ports of this machine."""
    urls = ", ".join(f'"http://127.0.0.1:{port}/v1"' for port in ports)
    remote = {"MODEL__ENGINE": "remote", "MODEL__NAME": "here", "REMOTE__BASE_URLS": f"[{urls}]"}
    return start(PII__ENABLED="false", CACHE__ENABLED="false", **remote, **settings)


@pytest.fixture
def direct(vllm: Server) -> Iterator[httpx.Client]:
    """A client of vLLM itself."""
    headers = {"Authorization": f"Bearer {UPSTREAM_KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{vllm.port}", headers=headers, timeout=120) as client:
        yield client


@pytest.fixture
def count(direct: httpx.Client) -> Count:
    """Adds up vLLM's own metrics whose names begin so."""

    def add(*names: str) -> float:
        lines = direct.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))

    return add
