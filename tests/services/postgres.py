"""A Postgres of the tests' own, from the machine's programs: a folder and a port of its own, gone at the end."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port
from tests.waiting import START_SECONDS

USERS = ("postgres", "nobody")
"""Postgres refuses to run as root; then it runs as the first of these that there is."""


def binaries() -> Path | None:
    """Return the folder of the newest Postgres on this machine."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class Postgres:
    """A server that can be stopped and started again."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    def make(self) -> None:
        command = [str(self._programs / "initdb"), "-D", str(self._folder / "db"), "-U", "tests", "-A", "trust"]
        subprocess.run(
            [*command, "--no-sync", "-E", "UTF8"],
            check=True,
            capture_output=True,
            timeout=START_SECONDS,
            **self._other_user(),
        )

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(self._folder)}
        options |= {"port": str(self.port), "max_connections": "100", "fsync": "off"}
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "db")]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        log = (self._folder / "log").open("ab")
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._other_user())
        self._wait()

    def _wait(self) -> None:
        command = [str(self._programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        for _ in range(200):
            if subprocess.run(command, timeout=10).returncode == 0:
                return
            time.sleep(0.05)
        raise TimeoutError((self._folder / "log").read_text())

    def stop(self) -> None:
        """End it at once, as a crash would; running it again repairs it."""
        if self._process is not None:
            self._process.terminate() if self._process.poll() is None else None
            try:
                self._process.wait(0.5)
            except subprocess.TimeoutExpired:
                self._process.send_signal(3)  # SIGQUIT: "immediate shutdown"
                self._process.wait(10)

    def kill(self) -> None:
        """Kill it with all that serves its connections, as the kernel does where memory is short."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes[1:], 10)
        if self._process is not None:
            self._process.wait(10)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Let it accept connections and answer nothing while the block runs."""
        processes = self._processes()
        # The server of a connection that was closed just now may end meanwhile.
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def _processes(self) -> list[psutil.Process]:
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]

    def database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        url = f"postgresql://tests@127.0.0.1:{self.port}"
        command = [str(self._programs / "psql"), f"{url}/postgres", "-q", "-c", f"CREATE DATABASE {name}"]
        subprocess.run(command, check=True, capture_output=True, timeout=20)
        return f"{url}/{name}"

    def _other_user(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        name = next(name for name in USERS if any(name == entry.pw_name for entry in pwd.getpwall()))
        entry = pwd.getpwnam(name)
        shutil.chown(self._folder, entry.pw_uid, entry.pw_gid)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": [], "cwd": self._folder}


@contextmanager
def running(programs: Path) -> Iterator[Postgres]:
    """Start a new server and throw it away at the end."""
    folder = Path(tempfile.mkdtemp(prefix="llm-postgres-"))
    server = Postgres(programs, folder)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
