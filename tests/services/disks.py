"""Disks that can be filled and emptied again while a service runs on them."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from tests.services.process import ServiceProcess

TMPFS_BYTES = 256 * 1024 * 1024
"""Room for what minutes of load write, so that the disk is full only while its filler is there."""


class Disk(Protocol):
    """A folder whose disk can be full."""

    folder: Path

    def fill(self, service: ServiceProcess | None = None) -> None:
        """Leave no room, for this service or the one that is started next."""

    def free(self, service: ServiceProcess | None = None) -> None:
        """Make room again."""

    def prepare(self) -> None:
        """Run in a new process before the service does."""


class SmallDisk:
    """A file system of a few megabytes and a file that takes all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, service: ServiceProcess | None = None) -> None:
        with self._filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def free(self, service: ServiceProcess | None = None) -> None:
        self._filler.unlink()

    def prepare(self) -> None:
        return


class LimitedWrites:
    """A service that may not write to files, by its own limit of their size: needs no right to mount anything."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._bytes = resource.RLIM_INFINITY

    def fill(self, service: ServiceProcess | None = None) -> None:
        self._limit(0, service)

    def free(self, service: ServiceProcess | None = None) -> None:
        self._limit(resource.RLIM_INFINITY, service)

    def _limit(self, size: int, service: ServiceProcess | None) -> None:
        if service is None:
            self._bytes = size
        else:
            resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def prepare(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._bytes, resource.RLIM_INFINITY))


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """Mount a small disk; skips where this user may not (a container without CAP_SYS_ADMIN)."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tests", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if mounted.returncode:
        pytest.skip(
            f"this user may not mount a file system ({mounted.stderr.strip()}); the limit of writes stands for it"
        )
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)  # noqa: S607
