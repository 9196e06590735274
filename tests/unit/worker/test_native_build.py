"""The sources that are compiled at load, and where what is made of them is kept."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import FLAGS, SOURCE_DIR, build_kernel_library

HEADS = ("-DKV_HEADS=2", "-DGROUPS=2", "-DSIZE=64")
TYPES = {"float": ("-DWEIGHT=Byte", "-DHEAD=float"), "Bfloat": ("-DWEIGHT=Bfloat", "-DHEAD=Bfloat")}
# What GCC 12 says of its own header.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized")


@pytest.mark.parametrize("name", sorted(each.name for each in SOURCE_DIR.glob("*.cpp")))
@pytest.mark.parametrize("number", TYPES)
def test_the_source_compiles_without_a_warning(name: str, number: str, compiler: str) -> None:
    macros = (*HEADS, *TYPES[number], f"-DNUMBER={number}")
    command = [compiler, *FLAGS, *WARNINGS, *macros, str(SOURCE_DIR / name), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"llm-service-{os.geteuid()}"


@pytest.mark.usefixtures("compiler")
def test_a_program_is_compiled_once(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its source or what it is compiled with changes."""
    sources = shutil.copytree(SOURCE_DIR, tmp_path / "sources")
    monkeypatch.setattr(native_build, "SOURCE_DIR", sources)
    build_kernel_library("gemm_packed")
    build_kernel_library("gemm_packed")
    assert 1 == len(list(kept.iterdir()))

    build_kernel_library("gemm_packed", {"OTHER": 1})
    with (sources / "simd.h").open("a") as header:
        header.write("\n")
    build_kernel_library("gemm_packed")

    assert 3 == len(list(kept.iterdir()))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["for a group", "a link"])
def test_programs_are_kept_where_nobody_else_writes(kind: str, kept: Path, tmp_path: Path) -> None:
    """What lies there is run: a folder that others may write to, or that leads elsewhere, is done without."""
    if kind == "a link":
        kept.symlink_to(tmp_path)
    else:
        kept.mkdir()
        kept.chmod(0o770)
    before = sorted(tmp_path.rglob("*"))

    assert build_kernel_library("gemm_packed").linear_floats

    assert before == sorted(tmp_path.rglob("*"))


@pytest.mark.usefixtures("compiler")
def test_a_damaged_program_is_made_again(kept: Path) -> None:
    """As after a crash of the machine."""
    build_kernel_library("gemm_packed")
    (library,) = kept.iterdir()
    library.write_bytes(b"")

    assert build_kernel_library("gemm_packed").linear_floats
    assert library.stat().st_size > 0
