"""Downloads: whole or not at all, within limits, checked each time, and nothing left behind."""

import asyncio
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from app.errors import AppError, ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.client import RegistryServer
from app.registry.download import Progress
from app.registry.downloader import Downloader
from app.registry.model_store import ModelStore
from app.registry.version import ModelVersion
from tests.unit.registry.stub import Registry

VERSION = ModelVersion(name="chat", version="1")


def downloads(registry: Registry) -> int:
    """Return how often weights were requested."""
    return sum(path.endswith("/model.safetensors") for path, _ in registry.requests)


def stored(folder: Path) -> set[str]:
    """Return what there is below a store's folder, relative to the model's own."""
    return {"/".join(path.relative_to(folder).parts[2:]) for path in folder.glob("*/*/**/*")} - {""}


def sha256sum(folder: Path) -> bytes:
    """Return what the program prints for all files of a folder, sorted by name."""
    program = shutil.which("sha256sum")
    assert program is not None
    names = sorted(path.name for path in folder.iterdir())
    return subprocess.run([program, *names], cwd=folder, capture_output=True, check=True).stdout


def download_processes() -> list[psutil.Process]:
    """Return the children that download; others may be left of other tests."""
    children = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in children if "app.registry.download_process" in each.cmdline()]


async def beginning(fetching: asyncio.Task[object], registry: Registry) -> None:
    """Wait until a download has requested the weights."""
    while not downloads(registry):  # another process' work
        assert not fetching.done()
        await asyncio.sleep(0.02)


async def test_a_model_is_downloaded_once_and_its_digest_recorded(
    registry: Registry, store: ModelStore, tmp_path: Path
):
    """Ten callers share a download, and the next start needs none, nor the registry."""
    progress: list[Progress] = []
    results = await asyncio.gather(*(store.fetch(VERSION, progress.append) for _ in range(10)))

    folder, version = results[0]
    sums = sha256sum(folder)
    assert f"sha256:{hashlib.sha256(sums).hexdigest()}" == version.digest
    assert {"config.json", "model.safetensors", "tokenizer.json"} == {path.name for path in folder.iterdir()}
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert Progress(total, total) == progress[-1]
    assert 1 == downloads(registry)
    assert 0o600 == (folder / "model.safetensors").stat().st_mode & 0o777

    away = ModelStore(
        RegistryServer(tracking_uri=registry.address), tmp_path / "registry", Downloader(max_bytes=1, total_seconds=1)
    )
    registry.replies[""] = lambda params: (500, {}, b"")
    assert (folder, version) == await away.fetch(VERSION)


async def test_files_that_were_changed_are_downloaded_again(registry: Registry, store: ModelStore, tmp_path: Path):
    folder, _ = await store.fetch(VERSION)
    outside = tmp_path / "outside"
    outside.write_bytes((folder / "model.safetensors").read_bytes())

    def link() -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(outside)

    changes = (
        lambda: (folder / "model.safetensors").write_bytes(b"WEIGHTS" * 1000),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "pytorch_model.bin").touch(),
        link,
    )
    for number, change in enumerate(changes, 2):
        change()
        await store.fetch(VERSION)
        assert number == downloads(registry)
        assert {"config.json", "model.safetensors", "tokenizer.json"} == {path.name for path in folder.iterdir()}
        assert not (folder / "model.safetensors").is_symlink()


async def test_a_folder_that_became_a_link_is_replaced_and_its_target_left(
    registry: Registry, store: ModelStore, tmp_path: Path
):
    folder, _ = await store.fetch(VERSION)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)

    await store.fetch(VERSION)

    assert not folder.is_symlink()
    assert (elsewhere / "model.safetensors").exists()


async def test_a_version_whose_files_have_changed_is_refused(registry: Registry, store: ModelStore, tmp_path: Path):
    """A version never changes; the record of the first download outlives its files."""
    folder, version = await store.fetch(VERSION)
    await store.remove(version)
    assert not folder.exists()
    registry.files["model/model.safetensors"] = b"others"

    with pytest.raises(ModelRefused, match="has other files than when it was first downloaded"):
        await store.fetch(VERSION)

    assert {"1.json"} == stored(tmp_path / "registry")


async def test_versions_and_registries_have_folders_of_their_own(registry: Registry, store: ModelStore, tmp_path: Path):
    registry.add("2")
    other = RegistryServer(tracking_uri=f"{registry.address}/")

    folders = {
        (await store.fetch(VERSION))[0],
        (await store.fetch(ModelVersion(name="chat", version="2")))[0],
        (await ModelStore(other, tmp_path / "registry", Downloader(max_bytes=10**6, total_seconds=30)).fetch(VERSION))[
            0
        ],
    }

    assert 3 == len(folders)


def _refused(registry: Registry) -> None:
    registry.files["MLmodel"] = b"flavors: {sklearn: {}}"


def _half_way(registry: Registry) -> None:
    registry.listed["model"] = [{"path": "model.safetensors", "is_dir": False, "file_size": 10}]


def _gone(registry: Registry) -> None:
    registry.replies["/model.safetensors"] = lambda params: (404, {}, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}')


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (_refused, ModelRefused, "this model has 'sklearn'"),
        (_half_way, ModelRefused, "is longer than the 10 bytes"),
        (_gone, ModelNotFound, "has no such model"),
    ],
)
async def test_a_download_that_fails_says_why_and_leaves_nothing(
    registry: Registry,
    store: ModelStore,
    tmp_path: Path,
    damage: Callable[[Registry], None],
    error: type[AppError],
    words: str,
):
    """The error is that of the process which downloads."""
    damage(registry)

    with pytest.raises(error, match=words):
        await store.fetch(VERSION)

    assert set() == stored(tmp_path / "registry")


async def test_a_folder_that_cannot_be_written_to_is_named(registry: Registry, server: RegistryServer, tmp_path: Path):
    (tmp_path / "registry").write_text("a file")
    store = ModelStore(server, tmp_path / "registry", Downloader(max_bytes=10**6, total_seconds=30))

    with pytest.raises(RegistryUnavailable, match="cannot be stored in"):
        await store.fetch(VERSION)


def _slowly(registry: Registry) -> None:
    """Let the weights take longer than any test."""

    def reply(params: object) -> tuple[int, dict[str, str], bytes]:
        time.sleep(1)
        return 200, {}, registry.files["model/model.safetensors"]

    registry.replies["/model.safetensors"] = reply


async def test_a_download_ends_when_its_time_is_over(registry: Registry, server: RegistryServer, tmp_path: Path):
    _slowly(registry)
    store = ModelStore(server, tmp_path / "registry", Downloader(max_bytes=10**6, total_seconds=0.3))

    with pytest.raises(RegistryUnavailable, match=r"took more than 0.3 s \(mlflow.download_seconds\)"):
        await store.fetch(VERSION)

    assert set() == stored(tmp_path / "registry")


async def test_a_download_that_is_cancelled_leaves_no_process_and_no_file(
    registry: Registry, store: ModelStore, tmp_path: Path
):
    _slowly(registry)
    fetching = asyncio.create_task(store.fetch(VERSION))
    await beginning(fetching, registry)

    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching

    assert [] == download_processes()
    assert set() == stored(tmp_path / "registry")


async def test_what_a_killed_service_has_left_is_removed_by_the_next_download(
    registry: Registry, store: ModelStore, tmp_path: Path
):
    """A folder that another service downloads to is locked, and stays."""
    folder, version = await store.fetch(VERSION)
    await store.remove(version)
    left, used = folder.parent / ".partial-left", folder.parent / ".partial-used"
    for each in (left, used):
        each.mkdir()
        (each / "model.safetensors").write_bytes(b"half")
    program = (
        f"import fcntl, os; fcntl.flock(os.open({str(used)!r}, os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); input()"
    )
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert other.stdout is not None
    await other.stdout.readline()

    await store.fetch(VERSION)

    assert (False, True) == (left.exists(), used.exists())
    other.kill()
    await other.communicate()


async def test_two_versions_are_downloaded_at_once(registry: Registry, store: ModelStore):
    """Neither takes the folder of the other for one that was left behind."""
    versions = [ModelVersion(name="chat", version=str(number)) for number in range(1, 5)]

    fetched = await asyncio.gather(*(store.fetch(version) for version in versions))

    assert 4 == len({folder for folder, _ in fetched})
    assert 1 == len({version.digest for _, version in fetched})


async def test_a_record_that_cannot_be_read_is_named(registry: Registry, store: ModelStore, tmp_path: Path):
    folder, _ = await store.fetch(VERSION)
    folder.with_name("1.json").write_text("{")

    with pytest.raises(ModelRefused, match=r"1\.json cannot be read; remove it"):
        await store.fetch(VERSION)


async def test_credentials_reach_the_download_by_environment_only(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not by its command line, which other users of the machine see; the service's own secrets do not reach it."""
    monkeypatch.setenv("SECURITY__API_KEY", "canary-of-the-service")
    _slowly(registry)
    server = RegistryServer(tracking_uri=registry.address, username="me", password="canary", timeout_seconds=5)
    store = ModelStore(server, tmp_path / "registry", Downloader(max_bytes=10**6, total_seconds=30))

    fetching = asyncio.create_task(store.fetch(VERSION))
    await beginning(fetching, registry)
    [child] = download_processes()
    command, environment = child.cmdline(), child.environ()
    folder, _ = await fetching

    assert "canary" not in " ".join(command)
    assert "canary" == environment["MLFLOW_TRACKING_PASSWORD"]
    assert "SECURITY__API_KEY" not in environment
    assert {"Basic bWU6Y2FuYXJ5"} == {headers["Authorization"] for _, headers in registry.requests}
    assert "canary" not in folder.with_name("1.json").read_text()


async def test_a_download_that_dies_is_a_failure(registry: Registry, store: ModelStore, tmp_path: Path):
    _slowly(registry)
    fetching = asyncio.create_task(store.fetch(VERSION))
    await beginning(fetching, registry)
    [child] = download_processes()
    child.kill()

    with pytest.raises(RegistryUnavailable, match="ended too early"):
        await fetching

    assert set() == stored(tmp_path / "registry")
