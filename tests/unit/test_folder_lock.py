"""A folder that one process owns."""

import tempfile
from pathlib import Path

import pytest

from app.folder_lock import LockedFolder, remove_unlocked


@pytest.mark.parametrize("lock_file", ["", "lock"])
def test_a_folder_that_another_process_removes_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock_file: str
):
    """Before it is locked it looks like one that a killed process has left."""
    create = tempfile.mkdtemp
    removed: list[Path] = []

    def removing(prefix: str, dir: Path) -> str:  # noqa: A002  # the name of its argument
        path = create(prefix=prefix, dir=dir)
        if len(removed) < 2:
            removed.append(Path(path))
            Path(path).rmdir()
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", removing)

    folder = LockedFolder(tmp_path, "one-", lock_file=lock_file)

    assert folder.path.is_dir()
    assert not {*removed} & {folder.path}
    folder.remove()


@pytest.mark.parametrize("lock_file", ["", "lock"])
def test_a_folder_is_not_removed_while_its_owner_has_locked_it(tmp_path: Path, lock_file: str):
    folder = LockedFolder(tmp_path, "one-", lock_file=lock_file)

    with pytest.raises(BlockingIOError):
        remove_unlocked(folder.path, lock_file=lock_file)

    assert folder.path.is_dir()
    folder.remove()
    assert not folder.path.exists()
