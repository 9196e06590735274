"""What may be loaded at run time: names, folders and patterns, checked before any process is started.

The models of the configuration are the operator's own choice and not checked here.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NoReturn

from app.config import ModelConfig
from app.config.model import ModelHosting
from app.errors import Forbidden, ModelLoadFailed
from app.registry.model_uri import parse_model_uri

FIELD = "model_name"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
MAX_LINKS = 10_000
"""Entries of a folder that are looked at; a model has far fewer."""


def check_source(config: ModelConfig, rules: ModelHosting) -> ModelConfig:
    """Return the configuration of a model that may be loaded, a folder with its real path; reads the file system.

    Raises: Forbidden: it may not; ModelLoadFailed: there is no such folder.
    """
    if "://" in config.name or ".." in config.name:
        _refuse("is not a name but an address or a path that leads elsewhere")
    if config.revision is not None and (not REVISION.fullmatch(config.revision) or ".." in config.revision):
        raise Forbidden.of_field("revision", "is not the name of a commit, a branch or a tag")
    if config.source == "local":
        root, folder = _folder(config.name, rules.roots)
        _check_allowed(folder.relative_to(root).as_posix(), rules.allowed)
        return config.model_copy(update={"name": str(folder)})
    if config.source == "mlflow":
        _check_registry_uri(config.name)
    elif not HUB_ID.fullmatch(config.name):
        _refuse("is not a hub id like owner/model")
    _check_allowed(config.name, rules.allowed)
    return config


def _check_registry_uri(name: str) -> None:
    try:
        parse_model_uri(name)
    except ValueError as error:
        _refuse(str(error))


def _check_allowed(name: str, patterns: Sequence[str]) -> None:
    if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
        _refuse("is none of the models that may be loaded (model.allowed)")


def _folder(name: str, roots: Sequence[Path]) -> tuple[Path, Path]:
    """Return the root and the real path of a folder, given as a path below a root, or with the root's own path."""
    if not roots:
        _refuse("is a folder, and none may be loaded (model.roots)")
    path, inside = PurePosixPath(name), False
    for given in roots:
        root = given.resolve()
        candidates = [Path(path)] if path.is_absolute() else [root / path, Path(path).absolute()]
        for candidate in candidates:
            if not candidate.is_relative_to(root) and not candidate.is_relative_to(given.absolute()):
                continue
            inside = True
            if candidate.is_dir():
                return root, _without_links_out(candidate, root)
    if not inside:
        _refuse_outside()
    raise ModelLoadFailed("The model cannot be loaded: there is no such folder.", details={"reason": "not_found"})


def _without_links_out(folder: Path, root: Path) -> Path:
    """Return the real path of a folder, if it and all that it holds are below the root."""
    real = folder.resolve()
    if real == root or not real.is_relative_to(root):
        _refuse_outside()
    for number, entry in enumerate(real.rglob("*")):
        if number > MAX_LINKS:
            _refuse("is a folder of too many files to be a model")
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            _refuse("is a folder with a link that leads out of it")
    return real


def _refuse_outside() -> NoReturn:
    _refuse("is outside of the folders from which models may be loaded (model.roots)")


def _refuse(reason: str) -> NoReturn:
    raise Forbidden.of_field(FIELD, reason)
