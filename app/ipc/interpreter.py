"""A child interpreter that serves a model, or will: how it is started, watched from outside, and ended.

Every interpreter has a private folder from the beginning.  What it is to load comes later, on its standard input; the
spare ones wait for that with their imports done.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from app.ipc.liveness import HEARTBEAT_SECONDS, Pulse
from app.ipc.private_folder import PrivateFolder
from app.ipc.worker_log import relay_lines

SPARE = "--spare"
"""Argument of an interpreter that imports at low priority, since no model waits for it."""
PULSE_BYTES = 8
"""A heartbeat on the standard output: the progress so far, big-endian."""
_LAST_LINES_SECONDS = 0.5
"""How long the last lines of a process may take to arrive; what it started may hold its standard error open."""
CODE_FOLDERS = "LLM_SERVICE_CODE_FOLDERS"
"""Variable that lists the folders in which compiled code may be kept, best first, as JSON."""


class Interpreter:
    """A running child process that understands `Start`."""

    def __init__(self, folder: PrivateFolder, process: asyncio.subprocess.Process) -> None:
        """Watch over a process that was just started; use `spawn` instead."""
        self._folder = folder
        self._process = process
        self._beats = 0
        self._progress = 0
        self._heard_at = _now()
        self._listening = asyncio.create_task(self._listen(), name="worker heartbeat")
        self._ending = asyncio.create_task(process.wait(), name="worker exit")
        self._relaying = asyncio.create_task(self._relay(), name="worker log")

    @classmethod
    async def spawn(cls, environment: Mapping[str, str], *, cache: Path | None = None, spare: bool = False) -> Self:
        """Start a process.

        Args:
            environment: all that it gets to see, besides the folders that compiled code may be kept in.
            cache: the best of these; survives the process.
            spare: nobody waits for it.
        Raises: OSError: it cannot be started.
        """
        folder = PrivateFolder()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", "app.worker", str(folder.path)),
                *([SPARE] if spare else []),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**environment, CODE_FOLDERS: json.dumps(_code_folders(cache, folder.path))},
                start_new_session=True,  # Ctrl-C in the terminal is for the service, which then stops the worker
            )
        except BaseException:
            folder.remove()
            raise
        return cls(folder, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def folder(self) -> Path:
        """Private to the two processes; removed with this one."""
        return self._folder.path

    @property
    def is_usable(self) -> bool:
        """Whether it runs, and has shown so of late."""
        return not self._ending.done() and _now() - self._heard_at < 3 * HEARTBEAT_SECONDS

    @property
    def has_imported(self) -> bool:
        """Whether its imports are done, as far as its last heartbeat says."""
        return self._progress > 0

    def pulse(self) -> Pulse:
        """Return the signs of life so far."""
        return Pulse(self._beats, _cpu_seconds(self.pid), self._progress)

    def write(self, line: bytes) -> None:
        """Write to its standard input, which a dead process drops."""
        if self._process.stdin is not None:
            self._process.stdin.write(line)

    async def wait(self) -> int:
        """Return its exit code, or the signal that ended it as a negative number."""
        return await asyncio.shield(self._ending)

    def kill(self) -> None:
        """Kill it with all that it started."""
        if not self._ending.done():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, grace_seconds: float) -> None:
        """Wait for it to exit, kill it if it does not, and remove its folder, even if this is cancelled meanwhile."""
        try:
            await asyncio.wait([self._ending], timeout=grace_seconds)
        finally:
            self.kill()
            # Something that it started may have inherited its standard output.
            self._listening.cancel()
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                await asyncio.wait([self._ending, self._listening])
                await asyncio.wait([self._relaying], timeout=_LAST_LINES_SECONDS)
            finally:
                self._relaying.cancel()
                self._folder.remove()

    async def _relay(self) -> None:
        if self._process.stderr is not None:
            await relay_lines(self._process.stderr, self.pid)

    async def _listen(self) -> None:
        while self._process.stdout is not None and (beats := await self._process.stdout.read(512 * PULSE_BYTES)):
            self._beats += 1
            self._heard_at = _now()
            self._progress = int.from_bytes(beats[-PULSE_BYTES:], "big")


def _code_folders(cache: Path | None, private: Path) -> list[str]:
    shared = Path(tempfile.gettempdir()) / f"llm-service-{os.geteuid()}"
    return [*([str(cache)] if cache else []), str(shared), str(private / "code")]


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its threads; 0 where the system does not say, and after its end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def _now() -> float:
    return asyncio.get_running_loop().time()
