"""Build the C++ kernel libraries when a model is loaded, for that model's shapes and this processor.

Most of what torch's operators lose on a CPU is overhead: they reorder weights in every call, start and stop threads for
every operator, and multiply thousands of tiny matrices.  The sources stand beside this file and need standard headers
only.  This module chooses the compiler and its flags, caches the libraries on disk and checks that a library and its
Python bindings agree about every structure.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.worker.code_folders import in_code_folder, require_free_space
from app.worker.execution.base import ExecutorUnavailableError

SOURCE_DIR = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
"""`-ffp-contract=fast` makes a multiplication and the addition that takes its result one fused multiply-add, which most
of the speed of float32 rests on.  It is GCC's default and not Clang's; stated here, both compute the same way.  The
kernels add every sum in one order for any batch size, so the bits of a token's result do not depend on its batch; the
tests check that bit for bit, with this flag."""
COMPILE_SECONDS = 60
UNFINISHED = "llm-kernels-"
"""Begins the name of a folder in which a file is being made; one that is left behind is removed."""
ABI_VERSION = 1
"""Version of the functions that the bindings call; LLMK_ABI_VERSION of abi.h."""


class CompileError(ExecutorUnavailableError):
    """No kernel library can be built for this model or machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The compiler, its flags and the sources: all that decides whether a kernel library can be built."""

    compiler: str | None
    """Path; None where no compiler is installed."""
    flags: tuple[str, ...]
    source_dir: Path


def toolchain() -> Toolchain:
    """Return the compiler that `CXX` names, else the first of `COMPILERS` on the PATH."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    return Toolchain(compiler, FLAGS, SOURCE_DIR)


def build_kernel_library(
    name: str,
    macros: Mapping[str, str | int] | None = None,
    structures: Mapping[str, type[ctypes.Structure]] | None = None,
) -> ctypes.CDLL:
    """Compile `<name>.cpp` with the given macros and load it: a second or two, or nothing where it is cached.

    Args: structures: those that the library and its bindings share, by the name of the library's layout function.

    Raises: CompileError: there is no compiler, it fails, or the library's ABI is not that of the bindings.
    """
    tools = toolchain()
    if tools.compiler is None:
        raise CompileError("there is no C++ compiler")
    definitions = [f"-D{macro}={value}" for macro, value in (macros or {}).items()]
    command = [tools.compiler, *tools.flags, *definitions, str(tools.source_dir / f"{name}.cpp"), "-o"]
    try:
        file_name = f"{name}-{_digest(command)}.so"
        library = in_code_folder(lambda folder: _load_or_compile(command, file_name, folder))
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{tools.compiler} fails: {_last_line(error.stderr)}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"nothing can be compiled with {tools.compiler}: {error}") from None
    _check_abi(library, name, structures or {})
    return library


def _check_abi(library: ctypes.CDLL, name: str, structures: Mapping[str, type[ctypes.Structure]]) -> None:
    """Compare what the library exports about its ABI with the bindings: version, sizes and offsets of structures.

    Raises: CompileError: they differ; a call would read or write the wrong memory.
    """
    version = library.llmk_abi_version() if hasattr(library, "llmk_abi_version") else None
    if version != ABI_VERSION:
        raise CompileError(f"{name}.cpp has ABI version {version}, its bindings {ABI_VERSION}")
    for structure_name, structure in structures.items():
        fields = [getattr(structure, field[0]) for field in structure._fields_]
        places = [number for field in fields for number in (field.offset, field.size)]
        expected = [len(fields), ctypes.sizeof(structure), *places]
        function = getattr(library, f"llmk_layout_{structure_name}", None)
        if function is not None:
            function.restype = ctypes.POINTER(ctypes.c_int64)
        if function is None or (table := function())[0] != len(fields) or table[: len(expected)] != expected:
            raise CompileError(f"{name}.cpp lays out {structure_name} in another way than its bindings")


def _load_or_compile(command: Sequence[str], file_name: str, folder: Path) -> ctypes.CDLL:
    """Load a library from a folder; compile it where it is missing or damaged."""
    with suppress(OSError):
        return ctypes.CDLL(str(folder / file_name))
    require_free_space(folder)
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as private:
        output = Path(private) / file_name
        # The compiler's own temporary files too: the usual place for them may be full.
        environment = os.environ | {"TMPDIR": private}
        subprocess.run(
            [*command, str(output)], check=True, capture_output=True, timeout=COMPILE_SECONDS, env=environment
        )
        # A loaded library no longer needs its file.
        library = ctypes.CDLL(str(output))
        # Atomic: no other process can load half a file.
        output.replace(folder / file_name)
        return library


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they compiled have left."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 2 * COMPILE_SECONDS:
                shutil.rmtree(leftover)


def _digest(command: Sequence[str]) -> str:
    """Hash everything that changes the machine code: sources, command, compiler and processor."""
    processor = _processor("model name|flags|Features")
    digest = hashlib.sha256(repr((command, Path(command[0]).stat().st_mtime_ns, processor)).encode())
    return _with_sources(digest, Path(command[-2]).parent)


def kernels_digest() -> str | None:
    """Hash everything that the speed of kernels depends on besides the processor; None where there is no compiler."""
    tools = toolchain()
    if tools.compiler is None:
        return None
    digest = hashlib.sha256(repr((tools.compiler, Path(tools.compiler).stat().st_mtime_ns, tools.flags)).encode())
    return _with_sources(digest, tools.source_dir)


def processor_features() -> str:
    """Return the processor's instruction sets."""
    return _processor("flags|Features")


def _with_sources(digest: "hashlib._Hash", folder: Path) -> str:
    for source in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _processor(fields: str) -> str:
    """Return fields of the processor's description; `-march=native` depends on its name and instruction sets."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted(set(re.findall(rf"^(?:{fields})\s*:.*", cpuinfo, re.MULTILINE))))


def _last_line(text: bytes) -> str:
    lines: Sequence[str] = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
