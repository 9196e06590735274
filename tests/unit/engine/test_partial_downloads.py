"""Parts of files that a killed download leaves are removed, and those of a running one are not."""

import fcntl
from pathlib import Path

import pytest

from app.engine import partial_downloads
from app.engine.partial_downloads import remove_partial_downloads


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub's client makes it, with two parts of files and a whole one."""
    blobs, locks = tmp_path / "models--org--chat" / "blobs", tmp_path / ".locks" / "models--org--chat"
    for folder in (blobs, locks):
        folder.mkdir(parents=True)
    for name in ("aaaa.12345678.incomplete", "bbbb.12345678.incomplete", "cccc"):
        (blobs / name).touch()
        (locks / f"{name[:4]}.lock").touch()
    monkeypatch.setattr(partial_downloads, "hub_cache", lambda: tmp_path)
    return tmp_path


def test_only_what_no_process_is_downloading_is_removed(cache: Path):
    with (cache / ".locks" / "models--org--chat" / "bbbb.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_partial_downloads("org/chat")

    assert ["bbbb.12345678.incomplete", "cccc"] == sorted(
        path.name for path in (cache / "models--org--chat" / "blobs").iterdir()
    )


def test_a_model_that_was_never_downloaded_has_nothing_to_remove(cache: Path):
    remove_partial_downloads("org/other")

    assert not (cache / "models--org--other").exists()
