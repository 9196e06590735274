"""Runs downloads of registered models in child processes; see `download_process.py`."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import app
from app.errors import RegistryUnavailable
from app.registry.client import RegistryServer
from app.registry.download import Downloaded, Progress
from app.registry.download_process import FAILURES, PASSWORD, TOKEN, USERNAME, Failed, Order, decode_line

LINE_BYTES = 2**20
"""Longest line of a child; its outcome names every file."""
GRACE_SECONDS = 10.0
"""For a child to report that its time is over; then it is killed."""
_ENVIRONMENT = frozenset(["PATH", "LANG", "SYSTEMROOT", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"])
_NETWORK = ("SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


class Downloader:
    """Downloads models within the configured limits."""

    def __init__(self, *, max_bytes: int, total_seconds: float) -> None:
        """Args:
        max_bytes: of all files of a model.
        total_seconds: for all of them.
        """
        self._max_bytes = max_bytes
        self._total_seconds = total_seconds

    async def run(
        self, server: RegistryServer, artifact_uri: str, folder: Path, report: Callable[[Progress], None]
    ) -> Downloaded:
        """Download the files of a model into an empty folder; cancelling this ends the download.

        Raises: ModelRefused, ModelNotFound, RegistryUnavailable: as `download` does; what was written stays.
        """
        order = Order(
            tracking_uri=server.tracking_uri,
            artifact_uri=artifact_uri,
            folder=str(folder),
            max_bytes=self._max_bytes,
            timeout_seconds=server.timeout_seconds,
            total_seconds=self._total_seconds,
        )
        process = await _launch(server)
        try:
            async with asyncio.timeout(self._total_seconds + GRACE_SECONDS):
                return await _outcome(process, order, report)
        except TimeoutError:
            raise RegistryUnavailable("The download took too long (mlflow.download_seconds).") from None
        except (OSError, EOFError, ValueError):
            raise RegistryUnavailable("The download ended too early; try again.") from None
        finally:
            await _end(process)


async def _launch(server: RegistryServer) -> asyncio.subprocess.Process:
    secrets = {USERNAME: server.username, PASSWORD: server.password, TOKEN: server.token}
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "app.registry.download_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                **{name: value for name, value in os.environ.items() if name in _ENVIRONMENT},
                **{name: value for name, value in os.environ.items() if name.startswith(_NETWORK)},
                **{name: value for name, value in secrets.items() if value is not None},
                "PYTHONPATH": str(Path(next(iter(app.__path__))).parent),
            },
            limit=LINE_BYTES,
            start_new_session=True,  # Ctrl-C in the terminal is for the service, which then ends the download
        )
    except OSError as error:
        raise RegistryUnavailable(f"The download could not be started ({error.strerror}).") from None


async def _outcome(process: asyncio.subprocess.Process, order: Order, report: Callable[[Progress], None]) -> Downloaded:
    if process.stdin is None or process.stdout is None:
        raise EOFError
    process.stdin.write(msgspec.json.encode(order) + b"\n")
    await process.stdin.drain()
    while line := await process.stdout.readline():
        match decode_line(line):
            case Progress() as progress:
                report(progress)
            case Failed(kind=kind, message=message):
                raise FAILURES[kind](message)
            case Downloaded() as downloaded:
                return downloaded
    raise EOFError


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
