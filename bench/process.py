"""A server as a process tree: started on a free port, suspended while another is measured, stopped at the end.

A server is ready once a given path returns 200.  `bench.serve`, `bench.overhead` and `bench.soak` use it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
KEY = "bench-key-0123456789"
READY_SECONDS = 300.0
STOP_SECONDS = 20.0
SHOWN_LINES = 15


class ServerFailed(Exception):
    """A server did not come up; the message ends with the last lines of its log."""


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._process = process
        self.port = port
        self.log = log

    @property
    def pid(self) -> int:
        """Process id of the process that was started, the parent of all others."""
        return self._process.pid

    def tree(self) -> list[psutil.Process]:
        """Return the process and all its descendants, itself first."""
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the processor time that the whole tree has taken."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self.tree()))

    def rss_bytes(self) -> list[int]:
        """Return the resident memory of each process of the tree."""
        return [process.memory_info().rss for process in self.tree()]

    def pause(self) -> None:
        """Put the tree to sleep, so that not even an idle loop of it disturbs another's measurement."""
        for process in self.tree():
            process.suspend()

    def resume(self) -> None:
        for process in self.tree():
            process.resume()

    def is_ready(self, path: str) -> bool:
        """Raises: ServerFailed: the process has ended."""
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            raise ServerFailed("it ended before it was ready:\n" + "\n".join(lines[-SHOWN_LINES:]))
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5)  # a fixed scheme and host
        except (OSError, urllib.error.URLError):
            return False
        return True

    def stop(self) -> None:
        """End the tree, politely first."""
        with suppress(psutil.NoSuchProcess):
            tree = self.tree()
            self.resume()
            self._process.terminate()
            psutil.wait_procs(tree, STOP_SECONDS)
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()


@contextmanager
def serving(
    command: list[str],
    port: int,
    environment: Mapping[str, str],
    ready: str,
    log: Path,
    seconds: float = READY_SECONDS,
) -> Iterator[Server]:
    """Run a server until the block ends.

    Args: seconds: how long it may take to come up.
    Raises: ServerFailed: it did not come up.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT)
    server = Server(process, port, log)
    try:
        until = time.monotonic() + seconds
        while not server.is_ready(ready):
            if time.monotonic() > until:
                raise ServerFailed(f"nothing answers after {seconds:.0f} s; its log is {log}")
            time.sleep(0.2)
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does, so that no server outlives it, least of all asleep."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def our_command(port: int) -> list[str]:
    """Return what starts this service, on the code of this folder."""
    return [sys.executable, "-m", "app", "serve", "--port", str(port)]


def our_environment(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """Return this machine's environment without a developer's settings, and with these; data goes to `folder`."""
    inherited = {name: value for name, value in os.environ.items() if "__" not in name}
    ours = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "APP__DATA_DIR": str(folder / "data"),
        "APP__PROMPTS_DIR": str(ROOT / "prompts"),
        "SECURITY__API_KEY": KEY,
        "SECURITY__MAX_PROMPT_CHARS": "100000",
        "RATE_LIMIT__ENABLED": "false",
        "LOGGING__LEVEL": "WARNING",
    }
    return {**inherited, **ours, **settings}
