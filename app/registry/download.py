"""Downloads the files of a registered model, with limits, and computes their digest.

Runs in `download_process.py`, away from the event loop that serves requests.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from app.errors import ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.client import MlflowClient, RegistryServer
from app.registry.flavor import DESCRIPTION, DESCRIPTION_BYTES, ArtifactFile, check_name, plan_files, store_path

TRIES = 3
RETRY_SECONDS = 0.5
PROGRESS_BYTES = 16 * 1024**2
"""Progress is reported after so much, and after each file."""
FREE_BYTES = 256 * 1024**2
"""Of the disk, which stay free."""


class DownloadedFile(msgspec.Struct, frozen=True):
    """A file as it was written."""

    name: str
    size: int
    sha256: str


class Downloaded(msgspec.Struct, frozen=True, tag=True):
    """All files of a model, by name."""

    files: tuple[DownloadedFile, ...]


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the download is."""

    bytes_done: int
    bytes_total: int


def digest(files: Iterable[DownloadedFile]) -> str:
    """Return the digest of a model: SHA-256 of what `sha256sum *` prints in its folder, sorted by name."""
    lines = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda file: file.name))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


async def download(
    server: RegistryServer,
    artifact_uri: str,
    folder: Path,
    *,
    max_bytes: int,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Downloaded:
    """Download the files of a model into an empty folder.

    Args:
        artifact_uri: where the registry says that they are.
        max_bytes: of all of them.
        report: called now and then.
    Raises: ModelRefused: it cannot be loaded, or is too large.  RegistryUnavailable: it cannot be had now.
    """
    root = store_path(artifact_uri)
    async with MlflowClient(server) as client:
        description = await _read_small(client, f"{root}/{DESCRIPTION}")
        files = await plan_files(root, description, client.list_folder)
        total = sum(file.size for file in files)
        _refuse_too_large(total, max_bytes, folder)
        done = 0

        def advance(size: int) -> None:
            report(Progress(done + size, total))

        written = []
        for file in files:
            written.append(await _fetch(client, file, folder, advance))
            done += file.size
            advance(0)
    return Downloaded(tuple(written))


def _refuse_too_large(total: int, max_bytes: int, folder: Path) -> None:
    if total > max_bytes:
        raise ModelRefused(f"It has {total} bytes; at most {max_bytes} are downloaded (mlflow.max_bytes).")
    free = shutil.disk_usage(folder).free
    if total + FREE_BYTES > free:
        raise RegistryUnavailable(f"It has {total} bytes, and the disk of the data folder has {free} left.")


async def _read_small(client: MlflowClient, path: str) -> bytes:
    """Return the MLmodel file.  Raises: ModelRefused: there is none, or a very long one."""
    content = bytearray()
    try:
        async with client.open_file(path) as chunks:
            async for chunk in chunks:
                content += chunk
                if len(content) > DESCRIPTION_BYTES:
                    raise ModelRefused(f"{DESCRIPTION}: has more than {DESCRIPTION_BYTES} bytes.")
    except ModelNotFound:
        raise ModelRefused(f"It has no {DESCRIPTION} file.") from None
    return bytes(content)


async def _fetch(
    client: MlflowClient, file: ArtifactFile, folder: Path, report: Callable[[int], None]
) -> DownloadedFile:
    """Download one file, again where the connection breaks."""
    for attempt in range(TRIES - 1):
        try:
            return await _write(client, file, folder, report)
        except RegistryUnavailable:
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
    return await _write(client, file, folder, report)


async def _write(
    client: MlflowClient, file: ArtifactFile, folder: Path, report: Callable[[int], None]
) -> DownloadedFile:
    check_name(file.name)
    path = folder / file.name
    path.unlink(missing_ok=True)
    sha256 = hashlib.sha256()
    size = reported = 0
    # The folder is new and private; a link in it would be somebody else's doing.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with open(descriptor, "wb") as target:  # noqa: ASYNC230, PTH123  # this process does nothing else
        async with client.open_file(file.path) as chunks:
            async for chunk in chunks:
                size += len(chunk)
                if size > file.size:
                    raise ModelRefused(f"{file.name}: is longer than the {file.size} bytes that the registry lists.")
                target.write(chunk)
                sha256.update(chunk)
                if size - reported >= PROGRESS_BYTES:
                    reported = size
                    report(size)
    if size < file.size:
        raise RegistryUnavailable(f"{file.name}: ended after {size} of {file.size} bytes.")
    return DownloadedFile(file.name, size, sha256.hexdigest())
