"""The folder of one download, beside the one that it becomes: locked, and removed with what it holds."""

from contextlib import suppress
from pathlib import Path

from app.errors import RegistryUnavailable
from app.folder_lock import LockedFolder, remove_unlocked

PREFIX = ".partial-"


def partial_folder(target: Path) -> LockedFolder:
    """Create the folder of a download that becomes `target`, and remove what downloads that were killed have left.

    Raises: RegistryUnavailable: nothing can be written there.
    """
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in target.parent.glob(f"{PREFIX}*"):
            with suppress(OSError):
                remove_unlocked(left)
        return LockedFolder(target.parent, PREFIX)
    except OSError as error:
        raise RegistryUnavailable(f"The model cannot be stored in {target.parent} ({error.strerror}).") from None
