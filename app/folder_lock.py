"""Folders that one process owns: created locked, removed by it, or by whoever finds them without an owner.

Whoever holds the lock owns the folder.  The system frees a lock when its process ends, however it ends, and a lock
means the same in every container that shares the file system, where a process id does not.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_TRIES = 3


class LockedFolder:
    """A folder that nobody else can read, locked by this process."""

    def __init__(self, parent: Path, prefix: str, *, lock_file: str = "") -> None:
        """Create and lock it.

        Args:
            prefix: how its name begins.
            lock_file: the file in it that carries the lock; empty: the folder does, and holds nothing but its content.
        Raises: OSError: there is no room, or nothing can be written to `parent`.
        """
        for _ in range(_TRIES):
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            # Another process that looks for folders without an owner may take one that is not locked yet.
            with suppress(FileNotFoundError, BlockingIOError):
                self._lock = _lock(self.path, lock_file, create=True)
                return
        raise BlockingIOError(0, "another process removes the folders that this one creates")

    def remove(self) -> None:
        """Unlock the folder, and remove what is still at its path; further calls do nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_unlocked(folder: Path, *, lock_file: str = "") -> None:
    """Remove a folder that no process has locked.

    Raises: FileNotFoundError: there is no such folder or lock file.
        OSError: a process has locked it, or it cannot be removed.
    """
    lock = _lock(folder, lock_file, create=False)
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _lock(folder: Path, lock_file: str, *, create: bool) -> int:
    """Return a descriptor that holds the lock of a folder.

    Raises: BlockingIOError: another process holds it; FileNotFoundError: there is none, or none any more.
    """
    import fcntl  # not at the top: Windows has none, and serves at least the echo engine

    flags = (os.O_RDWR | (os.O_CREAT if create else 0)) if lock_file else (os.O_RDONLY | os.O_DIRECTORY)
    descriptor = os.open(folder / lock_file, flags | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(f"{folder} was removed while it was being locked")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
