"""The folder of one download."""

from pathlib import Path

import pytest

from app.registry import partial_folder
from app.registry.partial_folder import PartialFolder


def test_a_folder_that_another_download_removes_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock = partial_folder.lock
    removed: list[Path] = []

    def removing(folder: Path) -> int:
        if len(removed) < 2:
            removed.append(folder)
            folder.rmdir()
        return lock(folder)

    monkeypatch.setattr(partial_folder, "lock", removing)

    folder = PartialFolder(tmp_path / "chat" / "1")

    assert folder.path.is_dir()
    assert not {*removed} & {folder.path}
    folder.remove()
