"""A worker's private folder: what a killed service left is removed, and nothing else."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.ipc.private_folder import PrivateFolder, sweep

ROOT = Path(__file__).parents[3]

OWNER = """
import sys
from app.ipc.private_folder import PrivateFolder
folder = PrivateFolder()
(folder.path / "tokenizer").mkdir()
(folder.path / "tokenizer" / "tokenizer.json").write_text("{}")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def owner(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a folder, and the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_folder_goes_with_its_owner_and_not_before(owner: tuple[subprocess.Popen[str], Path]) -> None:
    """The lock tells, which the system frees however a process ends; a process id would not, in another container."""
    process, folder = owner
    assert 0 == sweep()
    assert folder.exists()

    process.kill()
    process.wait()

    assert 1 == sweep()
    assert not folder.exists()


def test_one_in_use_here_stays_until_it_is_removed() -> None:
    """A second engine of the same service sweeps, too; removing twice is no error."""
    folder = PrivateFolder()
    assert 0o700 == folder.path.stat().st_mode & 0o777
    assert 0 == sweep()

    folder.remove()
    folder.remove()

    assert not folder.path.exists()


def test_a_folder_whose_owner_died_before_it_could_lock_it_is_removed(temporary: Path) -> None:
    """It is empty, then."""
    (temporary / "llm-worker-early").mkdir(mode=0o700)

    assert 1 == sweep()
    assert [] == list(temporary.iterdir())


def test_nothing_else_is_touched(temporary: Path) -> None:
    """Other names, files, links, folders that others may enter or that hold something of somebody else's."""
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / "lock").touch()
    (temporary / "llm-worker-link").symlink_to(temporary / "elsewhere")
    (temporary / "llm-worker-file").touch()
    for name, mode in (("llm-worker-open", 0o755), ("llm-worker-With-Others", 0o700), ("llm-worker-used", 0o700)):
        (temporary / name).mkdir()
        (temporary / name).chmod(mode)
        (temporary / name / ("lock" if name != "llm-worker-used" else "theirs")).touch()
    linked = temporary / "llm-worker-linked"
    linked.mkdir(mode=0o700)
    (linked / "lock").symlink_to(temporary / "elsewhere" / "lock")
    before = sorted(temporary.rglob("*"))

    assert 0 == sweep()

    assert before == sorted(temporary.rglob("*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_the_folder_of_another_user_is_not_touched(temporary: Path) -> None:
    """Root could remove it."""
    folder = temporary / "llm-worker-theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)

    assert 0 == sweep()
    assert folder.exists()
