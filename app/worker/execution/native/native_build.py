"""Programs in C++, compiled when a model is loaded, for that model and this processor.

What torch's operators lose on a CPU is mostly not arithmetic: weights brought into another order in each call, threads
started and stopped for each operator, thousands of tiny products.  The sources are in `native/`, with standard headers
only.  Decides how they are compiled and where what was made is kept; knows nothing of what they compute.
"""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 60


class CompileError(Exception):
    """There is no such program for this model or machine; the message says why."""


def compile_program(name: str, macros: Mapping[str, str | int] | None = None) -> ctypes.CDLL:
    """Compile a source of `native/` and load it; takes a second or two, and nothing when it was made before.

    Raises: CompileError: there is no compiler, or it fails.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise CompileError("there is no C++ compiler")
    defined = [f"-D{macro}={value}" for macro, value in (macros or {}).items()]
    command = [compiler, *FLAGS, *defined, str(SOURCES / f"{name}.cpp"), "-o"]
    try:
        return _kept(command, f"{name}-{_digest(command)}.so")
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{compiler} fails: {_last_line(error.stderr)}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{compiler} is of no use: {error}") from None


def _kept(command: Sequence[str], name: str) -> ctypes.CDLL:
    """Load a library from where they are kept; make it if it is not there, or damaged."""
    folder = _folder()
    if folder is not None:
        with suppress(OSError):
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory(prefix="llm-program-", dir=folder) as private:
        made = Path(private) / name
        subprocess.run([*command, str(made)], check=True, capture_output=True, timeout=COMPILE_SECONDS)
        # A loaded library needs its file no longer.
        library = ctypes.CDLL(str(made))
        if folder is not None:
            # At once: nobody finds half of it.
            made.replace(folder / name)
        return library


def _folder() -> Path | None:
    """Return where libraries are kept, with the temporary files; None if that is not this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"llm-service-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        log.warning("%s is not this user's alone: programs are compiled anew each time", folder)
        return None
    return folder


def _digest(command: Sequence[str]) -> str:
    """Tell apart what may compile to something else: sources, command, compiler and processor."""
    digest = hashlib.sha256(repr((command, Path(command[0]).stat().st_mtime_ns, _processor())).encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """Return what `-march=native` looks at, as far as the system tells."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return "\n".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*", told, re.MULTILINE))))


def _last_line(text: bytes) -> str:
    lines: Sequence[str] = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "without a word"
