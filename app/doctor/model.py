"""Examines the model's files, without loading them and without asking the hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.config import ModelConfig, ModelEntry, Settings
from app.config.mlflow import tracking_uri_problem
from app.doctor.findings import Finding, megabytes, ok, problem, warning
from app.doctor.machine import NVIDIA_DEVICE, available_memory
from app.registry.model_uri import parse_model_uri

SUBJECT = "model"
_POINTER = b"version https://git-lfs"


def examine_model(settings: Settings) -> Iterator[Finding]:
    model = settings.model
    if model.engine == "echo":
        yield ok(SUBJECT, "none is loaded: the engine echo repeats prompts")
    elif model.engine == "remote":
        yield from _remote(settings)
    else:
        yield from _files(settings, "model.name", model)
    for number, entry in enumerate(settings.models):
        if entry.config(model).engine not in ("echo", "remote"):
            yield from _files(settings, f"models.{number}.name", entry)
    embeddings = settings.embeddings
    if embeddings.model and embeddings.source == "local":
        yield from _folder("embeddings.model", Path(embeddings.model))
    elif embeddings.model:
        yield from _hub(settings, embeddings.model, embeddings.revision)
    if model.device == "cuda" and not NVIDIA_DEVICE.exists():
        yield problem(SUBJECT, "there is no NVIDIA GPU here, which model.device asks for", "set model.device: auto")


def _files(settings: Settings, key: str, model: ModelConfig | ModelEntry) -> Iterator[Finding]:
    match model.source:
        case "local":
            yield from _folder(key, Path(model.name))
        case "hub":
            yield from _hub(settings, model.name, model.revision)
        case "mlflow":
            yield _registry(settings, key, model.name)


def _registry(settings: Settings, key: str, name: str) -> Finding:
    try:
        parse_model_uri(name)
    except ValueError as error:
        return problem(SUBJECT, f"{key} {error}", "name a registered model")
    address = settings.where_registry
    if not address or (reason := tracking_uri_problem(address)) is not None:
        advice = "set mlflow.tracking_uri or MLFLOW_TRACKING_URI to the address of the MLflow server"
        return problem(SUBJECT, f"mlflow.tracking_uri {reason if address else 'is not set'}", advice)
    return ok(SUBJECT, f"{name} comes from the registry at {address}; the start downloads it unless it is here")


def _remote(settings: Settings) -> Iterator[Finding]:
    servers = settings.remote.base_urls
    if servers:
        yield ok(SUBJECT, f"none is loaded: other servers generate ({len(servers)} in remote.base_urls)")
    else:
        yield problem(SUBJECT, "model.engine is remote, and no server is named", "name it in remote.base_urls")


def _folder(key: str, folder: Path) -> Iterator[Finding]:
    try:
        config = _json(folder / "config.json")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it holds no JSON object"
        advice = f"name the folder of a model with config.json and safetensors as {key}"
        yield problem(SUBJECT, f"{folder / 'config.json'} cannot be read: {reason}", advice)
        return
    family = ", ".join(config.get("architectures") or [str(config.get("model_type", "unknown"))])
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        yield problem(SUBJECT, f"{folder} has no weights in the safetensors format", "no other is read; convert them")
        return
    missing = _missing_shards(folder)
    broken = [reason for path in weights if (reason := _broken(path))] + missing
    if broken:
        yield problem(SUBJECT, f"{folder}: {broken[0]}", "download it again")
        return
    size = sum(path.stat().st_size for path in weights)
    yield ok(SUBJECT, f"{folder} ({family}), {megabytes(size)} of weights")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        yield problem(SUBJECT, f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json into it")
    if (memory := available_memory()) is not None and size > memory:
        text = f"{megabytes(size)} of weights are more than the {megabytes(memory)} of memory that are free"
        yield problem(SUBJECT, text, "take a smaller model, model.quantization: int8, or a larger machine")


def _json(path: Path) -> dict[str, Any]:
    """Raises: OSError, ValueError: it cannot be read, or is no JSON object."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no object")  # as of bad JSON
    return found


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    try:
        names = set(_json(index)["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return [f"{index.name} cannot be read"]
    return [f"{name} is missing" for name in sorted(map(str, names)) if not (folder / Path(name).name).exists()]


def _broken(path: Path) -> str | None:
    """Return what is wrong with a safetensors file by its header, None if nothing is."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
            if start == _POINTER:
                return f"{path.name} is a pointer of Git LFS, not the weights (git lfs pull)"
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > 100_000_000:
                return f"{path.name} is no safetensors file"
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{path.name} has no header that can be read"
    return f"{path.name} is cut off" if path.stat().st_size < 8 + length + max(ends, default=0) else None


def _hub(settings: Settings, name: str, revision: str | None) -> Iterator[Finding]:
    # Late: it takes a while to import, and only hub models need it.
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        yield ok(SUBJECT, f"{name} is in the hub's cache on this machine")
    elif os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        advice = "unset HF_HUB_OFFLINE for the first start"
        yield problem(SUBJECT, f"{name} is not on this machine, and the hub is switched off", advice)
    else:
        yield ok(SUBJECT, f"{name} is not on this machine yet: the start downloads it from the hub")
        if settings.hub_token is None:
            yield warning(SUBJECT, "no hub token is set", "a gated model needs one: HF_TOKEN")
