"""Remembers for an alias or a stage which version serves, and which one was refused.

It is a small file, so that a restart neither takes a version that failed nor depends on a registry that is down.
"""

from pathlib import Path

import msgspec

from app.errors import RegistryUnavailable
from app.registry.version import ModelVersion


class AliasHistory(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one name that moves from version to version."""

    serving: ModelVersion | None = None
    """The last version that served."""
    refused: str | None = None
    """The number of the version that failed when it was to take over."""
    reason: str | None = None
    """Why it did."""


def read_history(path: Path) -> AliasHistory:
    """Return what a file says, or that nothing is known."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=AliasHistory)
    except (OSError, msgspec.DecodeError):
        return AliasHistory()


def write_history(path: Path, history: AliasHistory) -> None:
    """Replace a file; whoever reads it meanwhile gets the old or the new one.

    Raises: RegistryUnavailable: it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = path.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(history))
        written.replace(path)
    except OSError as error:
        raise RegistryUnavailable(f"{path} cannot be written ({error.strerror}).") from None
