"""The private folder of one child process: created locked, removed with it, or swept by the next service."""

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from app.folder_lock import LockedFolder, remove_unlocked

PREFIX = "llm-worker-"
_NAME = re.compile(rf"{PREFIX}[a-z0-9_]+")
_LOCK = "lock"


class PrivateFolder(LockedFolder):
    """A folder below the temporary directory that nobody else can read, locked by this process."""

    def __init__(self) -> None:
        """Create and lock it.

        Raises: OSError: there is no room, or the temporary directory cannot be written to.
        """
        super().__init__(Path(tempfile.gettempdir()), PREFIX, lock_file=_LOCK)


def sweep() -> int:
    """Remove what services that were killed have left in the temporary directory; return how many folders.

    A folder is removed only if this user owns it, nobody else can enter it, and no process holds its lock.
    """
    swept = 0
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            # One of the entries may go meanwhile, be locked, or not be this user's.
            with suppress(OSError):
                if _NAME.fullmatch(entry.name) and _is_private(entry.stat(follow_symlinks=False)):
                    _remove_left(Path(entry.path))
                    swept += 1
    return swept


def _is_private(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _remove_left(folder: Path) -> None:
    """Raises: OSError: it is not ours to remove."""
    try:
        remove_unlocked(folder, lock_file=_LOCK)
    except FileNotFoundError:
        # Its process ended before it could lock it.  Anything else without a lock is not ours to remove.
        folder.rmdir()
