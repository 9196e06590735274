"""Finds the embedded model and the prompts, which come with the package, whatever folder the service is started in."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = _PACKAGE / "embedded"
"""Where a wheel has them; a checkout has them beside the package."""


def packaged(path: Path) -> Path:
    """Return where a relative path is: in the working folder, or with the package; itself where it is in neither."""
    if path.is_absolute() or path.exists():
        return path
    ours = (_INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent) / path
    return ours if ours.exists() else path
