"""The download of a model's files: what it writes, and at which limits it ends."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import AppError, ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry import download as module
from app.registry.client import RegistryServer
from app.registry.download import Downloaded, Progress, download
from tests.unit.registry.stub import FILES, Registry

MAX_BYTES = 10**6


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits before a file is tried again."""
    monkeypatch.setattr(module, "RETRY_SECONDS", 0)


async def fetch(
    registry: Registry, folder: Path, report: Callable[[Progress], None] = lambda progress: None
) -> Downloaded:
    server = RegistryServer(tracking_uri=registry.address, timeout_seconds=5)
    return await download(server, registry.artifact_uri, folder, max_bytes=MAX_BYTES, report=report)


async def test_files_are_written_and_their_progress_reported(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes count from the first file to the last, within long files too."""
    monkeypatch.setattr(module, "PROGRESS_BYTES", 1000)
    registry.files["model/model.safetensors"] = b"weights" * 100_000
    progress: list[Progress] = []

    downloaded = await fetch(registry, tmp_path, progress.append)

    assert registry.files["model/model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert FILES["components/tokenizer/tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert ["config.json", "model.safetensors", "tokenizer.json"] == [file.name for file in downloaded.files]
    total = sum(file.size for file in downloaded.files)
    assert Progress(total, total) == progress[-1]
    assert sorted(each.bytes_done for each in progress) == [each.bytes_done for each in progress]
    assert len(progress) > len(downloaded.files)


def _weights(registry: Registry, size: int) -> None:
    registry.listed["model"] = [{"path": "model.safetensors", "is_dir": False, "file_size": size}]


def _gone(registry: Registry) -> None:
    registry.replies["/model.safetensors"] = lambda params: (404, {}, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')


def _broken(registry: Registry) -> None:
    registry.replies["/model.safetensors"] = lambda params: (200, {"Content-Length": "7000"}, b"weights")


def _compressed(registry: Registry) -> None:
    registry.replies["/model.safetensors"] = lambda params: (200, {"Content-Encoding": "gzip"}, b"")


def _long_description(registry: Registry) -> None:
    registry.files["MLmodel"] = b" " * (2**20 + 1)


def _no_description(registry: Registry) -> None:
    del registry.files["MLmodel"]


def _elsewhere(registry: Registry) -> None:
    registry.artifact_uri = "s3://bucket/model"


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda registry: _weights(registry, 10), ModelRefused, "model.safetensors: is longer than the 10 bytes"),
        (lambda registry: _weights(registry, 10_000), RegistryUnavailable, "ended after 7000 of 10000 bytes"),
        (lambda registry: _weights(registry, MAX_BYTES), ModelRefused, "at most 1000000 are downloaded"),
        (_gone, ModelNotFound, "has no such model"),
        (_broken, RegistryUnavailable, "RemoteProtocolError"),
        (_compressed, RegistryUnavailable, "compresses"),
        (_long_description, ModelRefused, "MLmodel: has more than 1048576 bytes"),
        (_no_description, ModelRefused, "It has no MLmodel file"),
        (_elsewhere, ModelRefused, "they are in s3"),
    ],
)
async def test_a_download_ends_at_the_first_thing_that_is_wrong(
    registry: Registry, tmp_path: Path, damage: Callable[[Registry], None], error: type[AppError], words: str
):
    damage(registry)

    with pytest.raises(error, match=words):
        await fetch(registry, tmp_path)


async def test_a_file_whose_connection_broke_is_downloaded_again(registry: Registry, tmp_path: Path):
    whole = registry.files["model/model.safetensors"]
    replies = iter([(200, {"Content-Length": "7000"}, b"weights"), (503, {}, b""), (200, {}, whole)])
    registry.replies["/model.safetensors"] = lambda params: next(replies)

    await fetch(registry, tmp_path)

    assert whole == (tmp_path / "model.safetensors").read_bytes()


async def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_its_download(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "FREE_BYTES", 10**18)

    with pytest.raises(RegistryUnavailable, match="and the disk of the data folder has"):
        await fetch(registry, tmp_path)

    assert not any(path.endswith("/model.safetensors") for path, _ in registry.requests)


async def test_a_link_in_the_folder_is_not_followed(registry: Registry, tmp_path: Path):
    """The folder is private, so there is none; if there were, its target would stay as it is."""
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").symlink_to(tmp_path / "outside")

    await fetch(registry, tmp_path / "folder")

    assert "mine" == (tmp_path / "outside").read_text()
    assert not (tmp_path / "folder" / "model.safetensors").is_symlink()
