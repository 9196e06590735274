"""The kernel libraries: how their sources are compiled, cached and checked against their bindings."""

import ctypes
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from app.ipc.interpreter import CODE_FOLDERS
from app.worker.execution.native import native_build
from app.worker.execution.native.native_build import (
    ABI_VERSION,
    FLAGS,
    SOURCE_DIR,
    CompileError,
    build_kernel_library,
)
from app.worker.execution.native.native_decoder import STRUCTURES

SHAPE = {"LLMK_NUM_KV_HEADS": 2, "LLMK_QUERIES_PER_KV": 2, "LLMK_HEAD_SIZE": 64}
KV_TYPES = ("float", "bfloat16")
# Weights in float32, float16 and int8 go with float32 activations, a mixture of them included.
FLOAT32_WEIGHTS = ("float", "float16", "int8_t")
WEIGHT_TYPES = [*itertools.product(("float",), FLOAT32_WEIGHTS, FLOAT32_WEIGHTS), ("bfloat16", "bfloat16", "bfloat16")]
# GCC 12 warns about its own header.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized")


def macros_of(name: str) -> list[dict[str, str | int]]:
    """Every combination of macros that a source is compiled with."""
    if name == "attention":
        return [{**SHAPE, "LLMK_KV_TYPE": kv} for kv in KV_TYPES]
    if name == "llama_forward":
        types = ("LLMK_KV_TYPE", "LLMK_WEIGHT_TYPE", "LLMK_LM_HEAD_TYPE")
        return [{**SHAPE, **dict(zip(types, combination, strict=True))} for combination in WEIGHT_TYPES]
    return [{}]


CASES = [(path.stem, macros) for path in sorted(SOURCE_DIR.glob("*.cpp")) for macros in macros_of(path.stem)]
QUICK_CASES = [next(case for case in reversed(CASES) if case[0] == name) for name in dict(CASES)]
"""One of each source, in bfloat16 where there is a choice."""


@pytest.mark.parametrize(
    ("name", "macros"),
    [case if case in QUICK_CASES else pytest.param(*case, marks=pytest.mark.soak) for case in CASES],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_every_source_compiles_without_a_warning(name: str, macros: dict[str, str | int], compiler: str) -> None:
    """With each combination of types of keys and values, weights and the output projection."""
    definitions = [f"-D{macro}={value}" for macro, value in macros.items()]
    command = [compiler, *FLAGS, *WARNINGS, *definitions, str(SOURCE_DIR / f"{name}.cpp"), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has these tiles")
@pytest.mark.parametrize("weights", ["bfloat16", "int8_t", "float16", "float"])
def test_a_processor_with_tiles_gets_their_instructions(weights: str, compiler: str) -> None:
    """Whatever this one has: only the compiler has to know them.  There is one type of weights in each library, so that
    the instructions are those of its products."""
    kv = "bfloat16" if weights == "bfloat16" else "float"
    types = {"LLMK_KV_TYPE": kv, "LLMK_WEIGHT_TYPE": weights, "LLMK_LM_HEAD_TYPE": weights}
    definitions = [f"-D{macro}={value}" for macro, value in {**SHAPE, **types}.items()]
    options = (*FLAGS, "-O1", "-march=sapphirerapids", "-S", *definitions)
    command = [compiler, *options, str(SOURCE_DIR / "llama_forward.cpp"), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (0, "") == (done.returncode, done.stderr)
    instructions = {"ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"}
    assert instructions == instructions & set(re.findall(r"^\s+(\w+)", done.stdout, re.MULTILINE))


def test_every_macro_has_the_prefix() -> None:
    """So that none can collide with a header's."""
    text = "\n".join(path.read_text() for path in [*SOURCE_DIR.glob("*.h"), *SOURCE_DIR.glob("*.cpp")])
    defined = re.findall(r"^\s*#\s*define\s+(\w+)", text, re.MULTILINE)

    assert defined
    assert [] == [macro for macro in (*defined, *CASES[0][1]) if not macro.startswith("LLMK_")]


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are cached."""
    folder = tmp_path / "compiled"
    monkeypatch.setenv(CODE_FOLDERS, json.dumps([str(folder)]))
    return folder


@pytest.fixture
def source_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources to be changed, compiled without optimisation in half of the time."""
    copy = shutil.copytree(SOURCE_DIR, tmp_path / "sources")
    monkeypatch.setattr(native_build, "SOURCE_DIR", copy)
    monkeypatch.setattr(native_build, "FLAGS", (*FLAGS, "-O0"))
    return copy


@pytest.mark.usefixtures("compiler")
def test_a_library_is_compiled_once(cache_folder: Path, source_dir: Path) -> None:
    """Until its source or what it is compiled with changes."""
    build_kernel_library("gemm_packed")
    build_kernel_library("gemm_packed")
    assert 1 == len(list(cache_folder.iterdir()))

    build_kernel_library("gemm_packed", {"LLMK_OTHER": 1})
    with (source_dir / "simd.h").open("a") as header:
        header.write("\n")
    build_kernel_library("gemm_packed")

    assert 3 == len(list(cache_folder.iterdir()))


@pytest.mark.usefixtures("compiler", "source_dir")
def test_what_a_killed_process_left_in_the_middle_of_compiling_is_removed(cache_folder: Path) -> None:
    """Not what another process compiles at this moment."""
    dead, live = cache_folder / "llm-kernels-dead", cache_folder / "llm-kernels-live"
    cache_folder.mkdir(mode=0o700)
    for folder in (dead, live):
        folder.mkdir()
        (folder / "half.so").write_bytes(b"half")
    os.utime(dead, (0, 0))

    build_kernel_library("gemm_packed")

    assert (False, True) == (dead.exists(), live.exists())


@pytest.mark.usefixtures("compiler", "source_dir")
def test_the_compiler_needs_no_other_temporary_folder(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual one may be full; what the compiler writes on its way lies beside the library, and goes with it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))

    assert callable(build_kernel_library("gemm_packed").llmk_linear_f32)

    assert 1 == len(list(cache_folder.iterdir()))


@pytest.mark.usefixtures("compiler")
def test_a_damaged_library_is_compiled_again(cache_folder: Path) -> None:
    """As after a crash of the machine."""
    build_kernel_library("gemm_packed")
    (library,) = cache_folder.iterdir()
    library.unlink()  # this process has the old one in its memory
    library.write_bytes(b"")

    assert callable(build_kernel_library("gemm_packed").llmk_linear_f32)
    assert library.stat().st_size > 0


@pytest.mark.usefixtures("compiler", "cache_folder")
def test_a_library_of_another_abi_version_is_refused(source_dir: Path) -> None:
    """A parameter may have changed its meaning, which no table of offsets shows."""
    header = source_dir / "abi.h"
    header.write_text(
        header.read_text().replace(f"LLMK_ABI_VERSION {ABI_VERSION}", f"LLMK_ABI_VERSION {ABI_VERSION + 1}")
    )

    with pytest.raises(CompileError, match=f"gemm_packed.cpp has ABI version {ABI_VERSION + 1}"):
        build_kernel_library("gemm_packed")


@pytest.mark.usefixtures("compiler", "cache_folder")
@pytest.mark.parametrize(
    ("structure", "file", "right", "wrong"),
    [
        ("packed_weights", "gemm_packed.h", "const float *scales, *bias;", "const float *scales, *bias, *zeros;"),
        ("decoder_layer", "llama_forward.cpp", "int64_t sliding_window;", "int64_t sliding_window, sinks;"),
        ("decoder_model", "llama_forward.cpp", "int32_t num_threads;", "int64_t num_threads;"),
        ("decoder_model", "llama_forward.cpp", "vocab_size, length;", "length, vocab_size;"),
        ("forward_batch", "llama_forward.cpp", "float* workspace;", "float* workspace, *scratch;"),
    ],
)
def test_a_library_that_lays_out_a_structure_differently_is_refused(
    structure: str, file: str, right: str, wrong: str, source_dir: Path
) -> None:
    """One more field, a wider one, two that changed places: the call would read the wrong memory."""
    source = source_dir / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))

    with pytest.raises(CompileError, match=f"lays out {structure} in another way"):
        build_kernel_library("llama_forward", CASES[-1][1], {structure: STRUCTURES[structure]})


@pytest.mark.usefixtures("compiler")
def test_a_structure_that_the_library_does_not_export_is_refused() -> None:
    class Unknown(ctypes.Structure):
        _fields_ = [("number", ctypes.c_int64)]

    with pytest.raises(CompileError, match="lays out unknown in another way"):
        build_kernel_library("gemm_packed", structures={"unknown": Unknown})
