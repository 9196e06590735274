"""Which package a tokenizer without tokenizer.json needs, and whether it is here.

transformers converts the older files by way of other packages; without them it reports a fault of the file.
"""

import importlib.util
import re
from pathlib import Path

_SENTENCEPIECE = ("sentencepiece", "google.protobuf")
_REQUIRED = re.compile(r"requires the (\w+) library", re.IGNORECASE)


def missing_package(folder: Path, error: BaseException) -> str | None:
    """Return why a tokenizer cannot be converted on this machine; None where no package is at fault."""
    if (named := _REQUIRED.search(str(error))) is not None:
        return f"its tokenizer needs the package {named[1].lower()}, which is not installed"
    for path in sorted(folder.iterdir()):
        lacking = [name for name in _needed(path) if not _is_installed(name)]
        if lacking:
            packages = " and ".join("protobuf" if name == "google.protobuf" else name for name in lacking)
            return f"{path.name} can only be read with {packages}, not installed here; install it or add tokenizer.json"
    return None


def _needed(path: Path) -> tuple[str, ...]:
    """Return the modules that read a file of a tokenizer; none for any other file."""
    if path.name == "tekken.json":
        return ("mistral_common",)
    if path.suffix == ".tiktoken":
        return ("tiktoken",)
    if path.suffix != ".model" or not path.is_file():
        return ()
    with path.open("rb") as file:
        # A message of protobuf that begins with its first field; the lines of a tiktoken file are base64.
        return _SENTENCEPIECE if file.read(1) == b"\n" else ("tiktoken",)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
