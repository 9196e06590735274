"""The service as a process of its own, on loopback, with the echo engine and the faults of a machine around it."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.ports import NO_TLS, free_port
from tests.waiting import START_SECONDS
from tests.web.access import ADMIN_KEY

ROOT = Path(__file__).parents[2]
FLUSH_SECONDS = 0.2


@dataclass
class ServiceProcess:
    """A started `python -m app serve`."""

    process: subprocess.Popen[bytes]
    address: str
    output: Path

    def client(self, key: str = ADMIN_KEY) -> httpx.AsyncClient:
        headers = {"X-API-Key": key}
        return httpx.AsyncClient(base_url=self.address, headers=headers, timeout=START_SECONDS, verify=NO_TLS)

    async def ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it says so; fails where the process ends instead."""
        async with asyncio.timeout(seconds), self.client() as http:
            while True:
                assert self.process.poll() is None, self.output.read_text()
                with suppress(httpx.TransportError):
                    if (await http.get("/readyz")).status_code == 200:
                        return
                # Not at once again, or it takes the processor from the model that loads.
                await asyncio.sleep(0.2)

    def stop(self, seconds: float = 60) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


def environment(url: str | None, **settings: str) -> dict[str, str]:
    """Return this machine's environment without settings of its own, and with these."""
    inherited = {name: value for name, value in os.environ.items() if "__" not in name and name != "DATABASE_URL"}
    ours = {
        "PYTHONPATH": str(ROOT),
        "MODEL__ENGINE": "echo",
        "SECURITY__API_KEY": ADMIN_KEY,
        "RATE_LIMIT__ENABLED": "false",
        "APP__PROMPTS_DIR": str(ROOT / "prompts"),
        "USAGE_LOG__FLUSH_SECONDS": str(FLUSH_SECONDS),
    }
    return inherited | ours | ({"DATABASE_URL": url} if url else {}) | settings


def start(
    url: str | None, folder: Path, *, prepare: Callable[[], None] | None = None, **settings: str
) -> ServiceProcess:
    """Start a service in `folder`.

    Args: prepare: runs in the new process before the service does.
    """
    port = free_port()
    output = folder / "output"
    with output.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", str(port)],
            cwd=folder,
            env=environment(url, **settings),
            stdout=log,
            stderr=log,
            preexec_fn=prepare,
        )
    return ServiceProcess(process, f"http://127.0.0.1:{port}", output)


@asynccontextmanager
async def serving(
    url: str | None, folder: Path, *, prepare: Callable[[], None] | None = None, **settings: str
) -> AsyncIterator[ServiceProcess]:
    """Run a service until the block ends, ready when it begins."""
    service = start(url, folder, prepare=prepare, **settings)
    try:
        await service.ready()
        yield service
    finally:
        service.kill()


def refused_start(url: str | None, folder: Path, *, prepare: Callable[[], None] | None = None, **settings: str) -> str:
    """Start a service that cannot run and return the line that says why; it ends by itself with code 2."""
    ended = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--port", "0"],
        cwd=folder,
        env=environment(url, **settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        preexec_fn=prepare,
    )
    said = ended.stdout + ended.stderr
    assert 2 == ended.returncode, said
    lines = [line for line in said.splitlines() if not line.startswith("{")]
    assert 1 == len(lines), said
    return lines[0]


def as_ordinary_user() -> None:
    """Give up root's right to write where file modes forbid it; for `prepare`, on Linux."""
    if os.geteuid() == 0:
        drop_from_bounding_set, override_modes, override_reading = 24, 1, 2
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (override_modes, override_reading):
            assert libc.prctl(drop_from_bounding_set, capability, 0, 0, 0) == 0
