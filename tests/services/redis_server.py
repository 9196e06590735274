"""A Redis of the tests' own, from the machine's program: a folder and a port of its own, gone at the end.

REDIS_SERVER names another program to run in its place, such as Valkey's.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_port

PROGRAMS = {"redis": "redis-server", "valkey": "valkey-server"}


def program(kind: str = "redis") -> str | None:
    """Return the path of a server's program; None where the machine has none.

    Raises: FileNotFoundError: REDIS_SERVER names none.
    """
    named = os.environ.get("REDIS_SERVER")
    if not named or (kind != "redis" and Path(named).name != PROGRAMS[kind]):
        return shutil.which(PROGRAMS[kind])
    if (found := shutil.which(named)) is None:
        raise FileNotFoundError(f"REDIS_SERVER is {named}, which is no program")
    return found


class RedisServer:
    """A server that can be killed, suspended, emptied and started again."""

    def __init__(self, program: str, folder: Path, *options: str) -> None:
        """Args: options: of the command line, beside those that every test needs."""
        self.folder = folder
        self.port = free_port()
        self._program, self._options = program, options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it empty, and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        options += ["--dir", str(self.folder), "--maxmemory-policy", "noeviction"]
        with (self.folder / "log").open("ab") as log:
            command = [self._program, *options, *self._options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()

    def _wait(self) -> None:
        for _ in range(400):
            if self._process is None or self._process.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", self.listening_port), 1):
                    return
            except OSError:
                time.sleep(0.025)
        raise TimeoutError((self.folder / "log").read_text())

    @property
    def listening_port(self) -> int:
        """The port that accepts connections, with TLS or without."""
        if "--tls-port" in self._options:
            return int(self._options[self._options.index("--tls-port") + 1])
        return self.port

    def kill(self) -> None:
        """End it as a crash does; nothing of what it held is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def restart(self) -> None:
        """Start it again on the same port, empty."""
        self.kill()
        self.start()

    def suspend(self) -> None:
        """Let it accept connections and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Suspend it while the block runs."""
        self.suspend()
        try:
            yield
        finally:
            self.resume()

    def command(self, *words: str) -> bytes:
        """Send one command and return the first part of the reply."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            parts = [word.encode() for word in words]
            connection.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts))
            return connection.recv(1_048_576)

    def flush(self) -> None:
        """Forget everything, the scripts too."""
        self.command("FLUSHALL")
        self.command("SCRIPT", "FLUSH")


@contextmanager
def running(program: str, *options: str, files: Sequence[Path] = ()) -> Iterator[RedisServer]:
    """Start a new server and throw it away at the end.  Args: files: are copied to its folder."""
    folder = Path(tempfile.mkdtemp(prefix="llm-redis-"))
    server = RedisServer(program, folder, *options)
    for path in files:
        shutil.copy(path, folder)
    try:
        server.start()
        yield server
    finally:
        if server._process is not None:
            server.resume()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
