"""The private folder of one child process: created locked, removed with it, or swept by the next service.

Whoever holds the lock owns the folder.  The system frees a lock when its process ends, however it ends, and a lock
means the same in every container that shares the file system, where a process id does not.
"""

import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "llm-worker-"
_NAME = re.compile(rf"{PREFIX}[a-z0-9_]+")
_LOCK = "lock"
_TRIES = 3


class PrivateFolder:
    """A folder below the temporary directory that nobody else can read, locked by this process."""

    def __init__(self) -> None:
        """Create and lock it.

        Raises: OSError: there is no room, or the temporary directory cannot be written to.
        """
        for _ in range(_TRIES):
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            # Another service that sweeps just now may take a folder that is not locked yet.
            with suppress(FileNotFoundError, BlockingIOError):
                self._lock = _lock(self.path, os.O_CREAT | os.O_RDWR)
                return
        raise BlockingIOError(0, "another process removes the folders that this one creates")

    def remove(self) -> None:
        """Remove the folder with all that it holds; further calls do nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def sweep() -> int:
    """Remove what services that were killed have left in the temporary directory; return how many folders.

    A folder is removed only if this user owns it, nobody else can enter it, and no process holds its lock.
    """
    swept = 0
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            # One of the entries may go meanwhile, or not be this user's.
            with suppress(OSError):
                if _NAME.fullmatch(entry.name) and _is_private(entry.stat(follow_symlinks=False)):
                    swept += _remove_unlocked(Path(entry.path))
    return swept


def _is_private(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _remove_unlocked(folder: Path) -> bool:
    try:
        lock = _lock(folder, os.O_RDWR)
    except FileNotFoundError:
        # Its process ended before it could lock it.  Anything else without a lock is not ours to remove.
        folder.rmdir()
        return True
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
    return True


def _lock(folder: Path, flags: int) -> int:
    """Return a descriptor that holds the lock of a folder.

    Raises: BlockingIOError: another process holds it; FileNotFoundError: there is none, or none any more.
    """
    import fcntl  # not at the top: Windows has none, and serves at least the echo engine

    descriptor = os.open(folder / _LOCK, flags | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(f"{folder} was removed while it was being locked")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
