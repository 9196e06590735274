"""The folders in which compiled code may be kept: nobody else can write to them, and the system runs what is there.

The parent lists them, best first: one in the service's data folder, one in the temporary directory, and one that is
removed with this process.  Each may be unusable in its own way, as when something else has its name.
"""

import errno
import functools
import json
import logging
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from app.ipc.interpreter import CODE_FOLDERS

log = logging.getLogger(__name__)

_COMPILERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""The variables of torch.compile and of Triton for the folder of what they make, and its name in ours.

torch creates the first when it is imported.
"""

_NEEDED_BYTES = 16 * 1024**2
"""Of free space, for a library and what the compiler makes on its way there."""
_ST_NOEXEC = getattr(os, "ST_NOEXEC", 0)
"""Linux tells how a file system is mounted."""

T = TypeVar("T")


def in_code_folder(use: Callable[[Path], T]) -> T:
    """Return what `use` makes of the best folder that it works with, and warn if that is not the first.

    Raises: OSError, subprocess.CalledProcessError: what happened with the last one.
    """
    refused: list[str] = []
    folders = _candidates()
    for folder in folders:
        try:
            _require_private(folder)
            result = use(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            if folder is folders[-1]:
                raise
            refused.append(f"{folder} ({_reason(error)})")
            continue
        if refused:
            _warn(f"compiled code cannot be kept in {', '.join(refused)}; {folder} is used instead")
        return result
    raise OSError("there is no folder for compiled code")


def require_free_space(folder: Path) -> None:
    """Raises: OSError: nothing new can be kept in a folder, or the system would not run it."""
    system = os.statvfs(folder)
    if system.f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, "it is read-only")
    if system.f_flag & _ST_NOEXEC:
        raise OSError(errno.EACCES, "it is mounted noexec")
    if system.f_bavail * system.f_frsize < _NEEDED_BYTES:
        raise OSError(errno.ENOSPC, "no space is left")


def choose_compiler_folders() -> None:
    """Name torch.compile and Triton a folder each, unless the operator has.

    By default torch's is one that anybody can block by its name, and Triton's is in a home that may be read-only.  Call
    it before torch is imported, which fails otherwise.
    """
    for variable, name in _COMPILERS.items():
        if variable not in os.environ:
            # Without any usable folder, the compiler may still find one.
            with suppress(OSError):
                os.environ[variable] = str(in_code_folder(functools.partial(_make_compiler_folder, name)))


def _make_compiler_folder(name: str, folder: Path) -> Path:
    require_free_space(folder)
    inside = folder / name
    inside.mkdir(mode=0o700, exist_ok=True)
    return inside


def _candidates() -> list[Path]:
    """Return the folders to try, best first; outside of a worker, one."""
    listed = os.environ.get(CODE_FOLDERS)
    if listed is not None:
        return [Path(each) for each in json.loads(listed)]
    return [Path(tempfile.gettempdir()) / f"llm-service-{os.geteuid()}"]


def _require_private(folder: Path) -> None:
    """Create a folder if it is missing.  Raises: OSError: it cannot be, or other users can write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise OSError(errno.EEXIST, "something else has its name") from None
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(errno.EPERM, "it is not private to this user")


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"the compiler failed with exit code {error.returncode}"


@functools.cache
def _warn(message: str) -> None:
    """Say it once in each process, however many libraries are compiled."""
    log.warning("%s", message)
