"""Where the files of adapters may lie: below the folders that the configuration names, and nowhere else."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.errors import InvalidRequest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, with every link in their paths resolved."""

    folder: str
    """Relative to the root that it is below."""
    config: Path
    weights: Path


def find_adapter_files(source: str, roots: Iterable[Path]) -> AdapterFiles:
    """Find an adapter's files; blocking.

    Args: source: a folder relative to one of the roots, or an absolute path below one.
    Raises: InvalidRequest: it is not below a root, or holds no adapter in safetensors; nothing outside of the roots is
        told apart from what does not exist.
    """
    if ".." in Path(source).parts:
        raise _refused("must not hold '..'")
    allowed = [root.resolve() for root in roots]
    if not allowed:
        raise InvalidRequest("No adapter can be loaded: this service has no folder for them (adapters.roots).")
    for root in allowed:
        folder = _below(root / source, root)
        if folder is not None and folder.is_dir():
            files = [_file(folder / name, allowed) for name in (CONFIG, WEIGHTS)]
            return AdapterFiles(str(folder.relative_to(root)), *files)
    raise _refused("names no folder below adapters.roots")


def find_configured_files(source: str, roots: Iterable[Path]) -> AdapterFiles:
    """Find the files of an adapter that the configuration names; blocking.

    It is the operator's own choice and may lie anywhere.

    Args: source: a folder relative to one of the roots or to the working directory, or an absolute path.
    Raises: InvalidRequest: it holds no adapter in safetensors.
    """
    candidates = [root / source for root in roots] + [Path(source).expanduser()]
    folder = next((each.resolve() for each in candidates if each.is_dir()), None)
    if folder is None:
        raise _refused("names no folder")
    files = [_file(folder / name, [Path("/")], where="") for name in (CONFIG, WEIGHTS)]
    return AdapterFiles(folder.name, *files)


def _below(path: Path, root: Path) -> Path | None:
    """Return a path without links; None where it leads out of the root, or to nothing."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # missing, too long, links in a circle, a NUL
        return None
    return resolved if resolved.is_relative_to(root) else None


def _file(path: Path, roots: Iterable[Path], where: str = " below adapters.roots") -> Path:
    """Return a file of an adapter; links may lead to another folder below a root, as the hub's cache has them."""
    resolved = next(filter(None, (_below(path, root) for root in roots)), None)
    if resolved is not None and resolved.is_file():
        return resolved
    if path.name == WEIGHTS and (path.parent / PICKLED_WEIGHTS).exists():
        raise _refused(f"holds {PICKLED_WEIGHTS}, which is pickled and never read; save the adapter as {WEIGHTS}")
    raise _refused(f"holds no file {path.name}{where}")


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest.of_field("source", reason)
