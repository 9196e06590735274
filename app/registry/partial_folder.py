"""The private folder of one download, beside the one that it becomes: locked, and removed with what it holds.

The system frees a lock when its process ends, however it ends, so a later download can remove what nobody locks.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from app.errors import RegistryUnavailable

PREFIX = ".partial-"
TRIES = 3


class PartialFolder:
    """A private folder beside the one that a download becomes; locked, so that a later service may remove the rest."""

    def __init__(self, target: Path) -> None:
        """Create it, and remove what downloads that were killed have left.

        Raises: RegistryUnavailable: nothing can be written there.
        """
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in target.parent.glob(f"{PREFIX}*"):
                _remove_unlocked(left)
            self.path, self._lock = _locked_folder(target.parent)
        except OSError as error:
            raise RegistryUnavailable(f"The model cannot be stored in {target.parent} ({error.strerror}).") from None

    def remove(self) -> None:
        """Remove it, unless it has become the model's own; unlock it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """Create a private folder and return it with the descriptor that holds its lock.  Raises: OSError."""
    for _ in range(TRIES):
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # Another download that looks for what was left just now may take a folder that is not locked yet.
        with suppress(FileNotFoundError, BlockingIOError):
            return path, lock(path)
    raise BlockingIOError(0, "other downloads remove the folders that this one creates")


def lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of a folder.

    Raises: BlockingIOError: another process holds it; FileNotFoundError: it has been removed.
    """
    import fcntl  # not at the top: Windows has none, and serves at least the echo engine

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(f"{folder} was removed while it was being locked")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unlocked(folder: Path) -> None:
    with suppress(OSError):
        descriptor = lock(folder)
        try:
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
