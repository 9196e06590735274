"""The files of registered models on this machine: downloaded once, checked each time, never half.

Below one folder for each registry: `<name>/<version>/` with the files, `<name>/<version>.json`, which records them and
stays when they are removed, and `<name>/alias-<alias>.json` with the history of an alias.  A version never changes, so
other files under its number are refused.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from app.errors import ModelRefused
from app.registry.alias_history import AliasHistory, read_history, write_history
from app.registry.client import MlflowClient, RegistryServer
from app.registry.download import Downloaded, DownloadedFile, Progress, digest
from app.registry.downloader import Downloader
from app.registry.model_uri import ModelUri
from app.registry.partial_folder import partial_folder
from app.registry.version import ModelVersion

log = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was downloaded as a version."""

    name: str
    version: str
    digest: str
    files: tuple[DownloadedFile, ...]
    downloaded_at: int
    """Seconds since 1970."""


class ModelStore:
    """Looks up registered models and has their files at hand; lives as long as the application."""

    def __init__(self, server: RegistryServer, folder: Path, downloader: Downloader) -> None:
        """Args:
        folder: where models are stored; created when missing.
        downloader: runs the downloads.
        """
        self._server = server
        self._folder = folder / hashlib.sha256(server.tracking_uri.encode()).hexdigest()[:16]
        self._downloader = downloader
        self._turns: dict[tuple[str, str], asyncio.Lock] = {}

    async def find_version(self, uri: ModelUri) -> str:
        """Return the number of the version that a name means now.  Raises: as `MlflowClient.describe`."""
        async with MlflowClient(self._server) as client:
            return await client.find_version(uri)

    async def describe(self, uri: ModelUri) -> ModelVersion:
        """Return what the registry says of the version that a name means now.  Raises: as `MlflowClient.describe`."""
        async with MlflowClient(self._server) as client:
            return await client.describe(uri)

    async def fetch(
        self, version: ModelVersion, report: Callable[[Progress], None] = lambda progress: None
    ) -> tuple[Path, ModelVersion]:
        """Return the folder of a version's files, and the version with their digest.

        Downloads them unless they are here already, once for any number of callers.

        Raises: ModelRefused: the model cannot be loaded, or its files have changed.
            ModelNotFound, RegistryUnavailable: it cannot be had now.
        """
        async with self._turns.setdefault((version.name, version.version), asyncio.Lock()):
            record = await asyncio.to_thread(self._read_record, version)
            if record is not None and await asyncio.to_thread(_is_intact, self._path(version), record):
                return self._path(version), replace(version, digest=record.digest)
            async with MlflowClient(self._server) as client:
                artifact_uri = await client.artifact_uri(version)
            downloaded = await self._download(version, artifact_uri, record, report)
            return self._path(version), replace(version, digest=digest(downloaded.files))

    async def history(self, uri: ModelUri) -> AliasHistory:
        """Return what became of the versions that a name has meant."""
        return await asyncio.to_thread(read_history, self._history_path(uri))

    async def record(self, uri: ModelUri, history: AliasHistory) -> None:
        """Store the same.  Raises: RegistryUnavailable: it cannot be written."""
        await asyncio.to_thread(write_history, self._history_path(uri), history)

    async def remove(self, version: ModelVersion, *, is_used: Callable[[], bool] = lambda: False) -> None:
        """Remove the files of a version, and leave their record.

        Args: is_used: is asked once no other call has to do with these files; what is used stays.
        """
        async with self._turns.setdefault((version.name, version.version), asyncio.Lock()):
            if not is_used():
                await asyncio.to_thread(shutil.rmtree, self._path(version), True)

    async def _download(
        self, version: ModelVersion, artifact_uri: str, record: Record | None, report: Callable[[Progress], None]
    ) -> Downloaded:
        partial = await asyncio.to_thread(partial_folder, self._path(version))
        try:
            downloaded = await self._downloader.run(self._server, artifact_uri, partial.path, report)
            found = digest(downloaded.files)
            if record is not None and record.digest != found:
                raise ModelRefused(
                    f"Version {version.version} of {version.name} has other files than when it was first downloaded "
                    f"({found} in place of {record.digest}); register them as a new version, or remove "
                    f"{self._record_path(version)}."
                )
            await asyncio.to_thread(self._publish, version, partial.path, downloaded)
        finally:
            await asyncio.to_thread(partial.remove)
        log.info("downloaded version %s of %s, %s", version.version, version.name, found)
        return downloaded

    def _history_path(self, uri: ModelUri) -> Path:
        return self._folder / uri.name / f"{uri.kind}-{uri.value}.json"

    def _path(self, version: ModelVersion) -> Path:
        return self._folder / version.name / version.version

    def _record_path(self, version: ModelVersion) -> Path:
        return self._path(version).with_name(f"{version.version}.json")

    def _read_record(self, version: ModelVersion) -> Record | None:
        try:
            return msgspec.json.decode(self._record_path(version).read_bytes(), type=Record)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, msgspec.DecodeError):
            raise ModelRefused(f"{self._record_path(version)} cannot be read; remove it to download again.") from None

    def _publish(self, version: ModelVersion, partial: Path, downloaded: Downloaded) -> None:
        path = self._path(version)
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
        record = Record(
            name=version.name,
            version=version.version,
            digest=digest(downloaded.files),
            files=downloaded.files,
            downloaded_at=int(time.time()),
        )
        # The record first: files without one are never used.
        written = partial.with_name(f"{partial.name}.json")
        written.write_bytes(msgspec.json.encode(record))
        written.replace(self._record_path(version))
        partial.rename(path)


def _is_intact(folder: Path, record: Record) -> bool:
    """Return whether a folder holds the files of a record and nothing else, none of them a link."""
    try:
        if folder.is_symlink() or {each.name for each in folder.iterdir()} != {file.name for file in record.files}:
            return False
        return all(_is_same(folder / file.name, file) for file in record.files)
    except OSError:
        return False


def _is_same(path: Path, file: DownloadedFile) -> bool:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with open(descriptor, "rb") as source:  # noqa: PTH123
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
            return False
        return hashlib.file_digest(source, "sha256").hexdigest() == file.sha256
