"""Which files of a registered model are read: those of MLflow's transformers flavor that hold weights, tokenizer and
configuration.

A model that needs code, pickled weights or another library is refused; no other file is looked at.
"""

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import yaml

from app.errors import ModelRefused
from app.registry.client import ArtifactInfo

DESCRIPTION = "MLmodel"
DESCRIPTION_BYTES = 1024**2
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
IGNORED_FILES = ("consolidated*", ".*", "-*")
"""Another format of the same weights, and names that other programs could take for something else."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
TOKENIZER = "components/tokenizer"
MAX_FILES = 500
_NAME = re.compile(r"(?!\.{1,2}$)[\w.+@=, -]{1,200}", re.ASCII)
MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """A file to download."""

    path: str
    """In the server's artifact store."""
    name: str
    """In the folder of the model."""
    size: int


ListFolder = Callable[[str], Awaitable[tuple[ArtifactInfo, ...]]]


def store_path(artifact_uri: str) -> str:
    """Return the path in the server's artifact store that an address of a model's files means.

    Raises: ModelRefused: they are elsewhere, or the path leads out of a folder.
    """
    found = re.fullmatch(r"mlflow-artifacts:/(?P<path>[^/].*)", artifact_uri)
    if found is None:
        scheme = artifact_uri.partition(":")[0]
        where = scheme if re.fullmatch(r"[a-z][a-z0-9+-]{0,20}", scheme) else "another place"
        raise ModelRefused(
            f"The registry does not serve this model's files itself, they are in {where}; "
            "start its server with --artifacts-destination and log the model there."
        )
    for part in found["path"].split("/"):
        check_name(part)
    return found["path"]


def check_name(name: str) -> None:
    """Raises: ModelRefused: it is not the plain name of a file or folder."""
    if not _NAME.fullmatch(name):
        raise ModelRefused(f"The registry lists a file whose name leads elsewhere or is no plain one: {_quoted(name)}.")


def model_folder(description: bytes) -> str:
    """Return the folder of the weights that a model's MLmodel file names.

    Raises: ModelRefused: it is no model of the transformers flavor, or needs code of its own.
    """
    flavors = _read(description)
    flavor = flavors.get("transformers")
    if not isinstance(flavor, dict):
        named = ", ".join(_quoted(str(name)) for name in list(flavors)[:5]) or "none"
        raise ModelRefused(f"MLmodel: only the flavor transformers is loaded; this model has {named}.")
    for name, each in flavors.items():
        if isinstance(each, dict) and each.get("code"):
            raise ModelRefused(f"MLmodel: {_quoted(str(name))}.code brings Python code, which is never run.")
    if flavor.get("peft_adaptor"):
        raise ModelRefused("MLmodel: transformers.peft_adaptor: it is an adapter for another model, not a whole one.")
    folder = flavor.get("model_binary")
    if folder is None and flavor.get("source_model_revision"):
        raise ModelRefused(
            "MLmodel: transformers.source_model_revision: it holds no weights but names a model of the hub; "
            "log it with save_pretrained=True."
        )
    if not isinstance(folder, str):
        raise ModelRefused("MLmodel: transformers.model_binary must name the folder of the weights.")
    check_name(folder)
    return folder


async def plan_files(root: str, description: bytes, list_folder: ListFolder) -> list[ArtifactFile]:
    """Return the files to download, without two of one name.

    Args:
        root: path of the model.
        description: its MLmodel file.
        list_folder: returns the entries of a folder by its path.
    Raises: ModelRefused: the model cannot be loaded.  What `list_folder` raises.
    """
    folder = model_folder(description)
    if "code" in map(_entry_name, await list_folder(root)):
        raise ModelRefused("It has a folder code, whose Python code is never run; log the model without code_paths.")
    entries = await list_folder(f"{root}/{folder}")
    names = [_entry_name(entry) for entry in entries if not entry.is_dir]
    if not any(fnmatch(name, "*.safetensors") for name in names):
        pickled = next((name for name in names if any(fnmatch(name.lower(), each) for each in PICKLED)), None)
        if pickled is not None:
            raise ModelRefused(f"{folder}/{pickled}: pickled weights are never read; save the model as safetensors.")
        raise ModelRefused(f"{folder}: it has no weights in the safetensors format, and no other is read.")
    files = {file.name: file for file in _wanted(f"{root}/{folder}", entries)}
    # MLflow takes the tokenizer from here, whatever else lies beside the weights.
    files |= {
        file.name: file
        for file in _wanted(f"{root}/{TOKENIZER}", await list_folder(f"{root}/{TOKENIZER}"))
        if file.name != "config.json" and not file.name.endswith(".safetensors")
    }
    if len(files) > MAX_FILES:
        raise ModelRefused(f"It has {len(files)} files; at most {MAX_FILES} are downloaded.")
    return sorted(files.values(), key=lambda file: file.name)


def _wanted(folder: str, entries: Iterable[ArtifactInfo]) -> Iterable[ArtifactFile]:
    for entry in entries:
        name = _entry_name(entry)
        if entry.is_dir or not _is_wanted(name):
            continue
        if entry.file_size is None or entry.file_size < 0:
            raise ModelRefused(f"The registry does not say how long {_quoted(name)} is.")
        yield ArtifactFile(path=f"{folder}/{name}", name=name, size=entry.file_size)


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, each) for each in FILES) and not any(fnmatch(name, each) for each in IGNORED_FILES)


def _entry_name(entry: ArtifactInfo) -> str:
    """Return the name of an entry.  Raises: ModelRefused: it is a path, or no plain name."""
    check_name(entry.path)
    return entry.path


def _read(description: bytes) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(description)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise ModelRefused("MLmodel: is not valid YAML.") from None
    flavors = content.get("flavors") if isinstance(content, dict) else None
    if not isinstance(flavors, dict):
        raise ModelRefused("MLmodel: names no flavors.")
    return flavors


def _quoted(name: str) -> str:
    """Return a name from the registry as it may stand in one line."""
    return repr(name[:MAX_SHOWN])
