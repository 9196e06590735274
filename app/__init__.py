"""An OpenAI-style backend for your own Hugging Face models."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _version() -> str:
    """Return the version of pyproject.toml: from the installed package or, in a checkout that is run as it is, from it."""
    try:
        return version("llm-service")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


__version__ = _version()
