"""Where compiled code is kept: each way in which a folder can be unusable ends in the next one, and one warning."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.ipc.interpreter import CODE_FOLDERS
from app.worker.code_folders import choose_compiler_folders
from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import CompileError, build_kernel_library

ROOT = Path(__file__).parents[3]


def _file(folder: Path) -> None:
    folder.write_text("not a folder")


def _link(folder: Path) -> None:
    folder.symlink_to(folder.parent)


def _dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def _writable_for_a_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def _below_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("not a folder")


BLOCKED = [_file, _link, _dangling_link, _writable_for_a_group, _below_a_file]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders for code, of which neither exists, and a quick compiler."""
    best, second = tmp_path / "data" / "compiled", tmp_path / "second"
    best.parent.mkdir()
    monkeypatch.setenv(CODE_FOLDERS, json.dumps([str(best), str(second)]))
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-O0"))
    return best, second


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "block",
    [*BLOCKED[:2], *(pytest.param(each, marks=pytest.mark.soak) for each in BLOCKED[2:])],
    ids=lambda block: block.__name__.strip("_"),
)
def test_a_folder_that_cannot_be_used_is_passed_over_with_one_warning(
    block: Callable[[Path], None], folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The service runs what is there: only a folder that nobody else can write to will do.  The next is as fast."""
    best, second = folders
    block(best)
    before = sorted(best.parent.parent.rglob("*"))

    for macro in range(2):
        assert callable(build_kernel_library("gemm_packed", {"LLMK_OTHER": macro}).llmk_linear_f32)

    assert 2 == len(list(second.iterdir()))
    assert before == [path for path in sorted(best.parent.parent.rglob("*")) if not path.is_relative_to(second)]
    (warning,) = warnings_in(caplog)
    assert str(best) in warning
    assert str(second) in warning


@pytest.mark.usefixtures("compiler")
def test_the_best_folder_is_used_without_a_word(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """It is created private, with the data folder if that is not there yet."""
    best, second = folders
    best.parent.rmdir()

    build_kernel_library("gemm_packed")

    assert 0o700 == best.stat().st_mode & 0o777
    assert (1, False, []) == (len(list(best.iterdir())), second.exists(), warnings_in(caplog))


@pytest.mark.usefixtures("compiler")
def test_without_any_usable_folder_the_reason_is_that_of_the_last(folders: tuple[Path, Path]) -> None:
    """`auto` then leaves the layers to torch, and `layers` stops the start with this message."""
    for folder in folders:
        _file(folder)

    with pytest.raises(CompileError, match="something else has its name"):
        build_kernel_library("gemm_packed")


@pytest.mark.parametrize(
    ("variable", "name"), [("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")]
)
def test_a_compiler_is_given_a_folder_that_it_can_create(
    variable: str, name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own choice is a name that anything can block or a home that is read-only; the operator's choice stays."""
    best, second = folders
    _dangling_link(best)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/another")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/another")
    monkeypatch.delenv(variable)

    choose_compiler_folders()
    assert str(second / name) == os.environ[variable]

    monkeypatch.setenv(variable, "/theirs")
    choose_compiler_folders()
    assert "/theirs" == os.environ[variable]


BUILD = """
import logging
from app.worker.execution.native import native_build
logging.basicConfig(format="%(message)s")
native_build.FLAGS += ("-O0",)
assert callable(native_build.build_kernel_library("gemm_packed").llmk_linear_f32)
"""

IN_A_NAMESPACE = ("/usr/bin/unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-c")


@pytest.fixture(scope="session")
def mounts() -> None:
    """A process of this user may mount file systems of its own."""
    tried = subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs none /mnt"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine does not let a process mount: {tried.stderr.strip()}")


@pytest.mark.usefixtures("compiler", "mounts")
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("noexec", "noexec"),
        pytest.param("ro", "read-only", marks=pytest.mark.soak),
        pytest.param("size=64k", "no space", marks=pytest.mark.soak),
    ],
    ids=["noexec", "read-only", "full"],
)
def test_a_file_system_that_cannot_hold_code_is_passed_over(
    options: str, reason: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """As a container's volumes and temporary directories often are; on a real mount, in a process of its own."""
    best, second = folders
    best.mkdir()
    mount = f'mount -t tmpfs -o mode=700,{options} none "{best}" && exec "$0" -c "$1"'

    built = subprocess.run(
        [*IN_A_NAMESPACE, mount, sys.executable, BUILD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    assert (0, 1) == (built.returncode, len(list(second.iterdir()))), built.stderr
    (warning,) = [line for line in built.stderr.splitlines() if "compiled code" in line]
    assert reason in warning
