"""Removes the partial files that a download from the hub leaves in the cache when its process is killed."""

import fcntl
from contextlib import suppress
from pathlib import Path

SUFFIX = ".incomplete"


def hub_cache() -> Path:
    """Return the folder in which the hub's client stores models."""
    # Late: it takes a while to import, and only models of the hub need it.
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def remove_partial_downloads(model: str) -> None:
    """Remove the parts of a model's files that no process is downloading; one that does holds the lock of its file."""
    cache = hub_cache()
    repository = f"models--{model.replace('/', '--')}"
    for part in (cache / repository / "blobs").glob(f"*{SUFFIX}"):
        lock = cache / ".locks" / repository / f"{part.name.partition('.')[0]}.lock"
        # It may be gone, or on a file system that is not ours to write to.
        with suppress(OSError), lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
