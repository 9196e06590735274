"""Where a model's files are: the spec of a load, the files of a registry, and the start of a worker on them."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

from msgspec import structs

from app.config import ModelConfig
from app.config.remote import RemoteConfig
from app.engine.base import LoadProgress
from app.engine.partial_downloads import remove_partial_downloads
from app.errors import EngineFailed
from app.ipc.messages import ModelSpec, Ready
from app.ipc.spare_interpreters import SpareInterpreters
from app.ipc.supervisor import Supervisor
from app.ipc.worker_process import WorkerLink, WorkerProcess

Report = Callable[[LoadProgress], None]
Task = Literal["generate", "embed"]
MODULES, CONFIG = "modules.json", "config.json"
"""The files that say what a folder's model is for: the first one only an encoder's of sentence-transformers has."""
CONFIG_BYTES = 1024**2
"""Largest configuration that is looked at here; the worker reads any."""
_WITHOUT_HEAD = re.compile(r"\w+(?<!LMHead)(Model|ForMaskedLM|ForPreTraining)")
"""Classes of models that generate nothing."""


def task_of(folder: Path) -> Task:
    """Return what the model of a folder is for, as far as its files say it; reads the file system."""
    if (folder / MODULES).is_file():
        return "embed"
    try:
        if (folder / CONFIG).stat().st_size > CONFIG_BYTES:
            return "generate"
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return "generate"  # its load says what is wrong
    named = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(named, list) or not named:
        return "generate"
    without = all(isinstance(name, str) and _WITHOUT_HEAD.fullmatch(name) for name in named)
    return "embed" if without else "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """A model to load under a public name."""

    name: str
    config: ModelConfig
    task: Task = "generate"
    """What it is loaded for; of a model that embeds `config` says the source, the device and the type."""
    remote: RemoteConfig | None = None
    """The servers that run it, where its engine is remote."""
    hub_token: str | None = field(default=None, repr=False, compare=False)
    """For gated models of the hub, in place of the configured one; used for this load and then forgotten."""

    def is_same(self, other: "LoadSpec") -> bool:
        """Return whether both load the same model in the same way; a folder may be written in two ways."""
        return (self.name, self.task, self._described()) == (other.name, other.task, other._described())

    def _described(self) -> ModelConfig:
        changes: dict[str, object] = {"served_name": None}
        if self.config.source == "local":
            changes["name"] = str(Path(self.config.name).resolve())
        return self.config.model_copy(update=changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedModel:
    """The files of a registry's model on this machine."""

    folder: Path
    revision: str
    """Says which version they are, as in `EngineInfo.revision`."""
    release: Callable[[], Awaitable[None]]
    """Called once no worker needs the files any more."""


FetchModel = Callable[[str, Report], Awaitable[FetchedModel]]
"""Fetches the model of a registry's URI, reporting its progress; whoever cancels it finds nothing left behind.

Raises: AppError: it cannot; `details["reason"]` is one of `LoadFailure`.
"""


async def no_registry(uri: str, report: Report) -> FetchedModel:
    """Refuse every URI: the `FetchModel` of a service without a registry."""
    raise EngineFailed(
        "The model cannot be loaded: no MLflow registry is configured here.", details={"reason": "unsupported"}
    )


class WorkerLauncher:
    """Starts the workers of one model, each after the other; fetches its files before the first."""

    def __init__(
        self,
        spec: ModelSpec,
        interpreters: SpareInterpreters,
        *,
        uri: str | None = None,
        hub_token: str | None = None,
        load_token: str | None = None,
        fetch: FetchModel = no_registry,
    ) -> None:
        """Args:
        uri: where the model is in a registry; None for one whose files are where `spec` says.
        hub_token: the configured one.
        load_token: in its place, for the first start alone.
        fetch: brings the files of a model of a registry.
        """
        source = "mlflow" if uri is not None else spec.source
        self.origin = sha256(repr((source, spec.name, spec.revision)).encode()).hexdigest()[:16]
        self.report: Report = lambda progress: None
        """Is called with the progress of a fetch."""
        self._uri = uri
        self._downloads = spec.name if source == "hub" else None
        """The model of the hub that a worker may be downloading now."""
        self._spec = spec
        self._interpreters = interpreters
        self._hub_token = hub_token
        self._load_token = load_token
        self._pins = load_token is not None
        self._fetch = fetch
        self._fetched: FetchedModel | None = None

    async def __call__(self) -> WorkerLink:
        """Start a worker.  Raises: AppError: the files cannot be fetched; OSError: no process can be started."""
        if self._uri is not None and self._fetched is None:
            self._fetched = await self._fetch(self._uri, self.report)
            self._spec = _of_folder(self._spec, str(self._fetched.folder), self._fetched.revision)
        token, self._load_token = self._load_token, None
        return await WorkerProcess.launch(self._spec, self._hub_token, self._interpreters, load_token=token)

    def on_ready(self, ready: Ready) -> None:
        """Note where the files are: after a load with a token of its own, later workers have only them."""
        self._downloads = None
        if self._pins and ready.folder is not None:
            self._spec = _of_folder(self._spec, ready.folder, ready.revision)

    async def close(self) -> None:
        """Give back fetched files, and remove what a download leaves that was cut short; no worker lives any more."""
        if self._downloads is not None:
            await asyncio.to_thread(remove_partial_downloads, self._downloads)
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            await fetched.release()


def show_fetch(worker: Supervisor) -> Report:
    """Return a function that shows the progress of a fetch as that of the worker which is to load the files."""

    def report(progress: LoadProgress) -> None:
        worker.show_progress(progress.stage, progress.bytes_done, progress.bytes_total)

    return report


def _of_folder(spec: ModelSpec, folder: str, revision: str | None) -> ModelSpec:
    return structs.replace(spec, source="local", name=folder, revision=revision)


def model_spec(config: ModelConfig) -> ModelSpec:
    """Return what a worker is told to load of a model that generates."""
    return ModelSpec(
        name=config.name,
        source="local" if config.source == "mlflow" else config.source,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        compile=config.compile,
        max_weight_copies=config.max_weight_copies,
        revision=config.revision,
        max_model_len=config.max_model_len,
        threads=config.threads,
        engine="auto" if config.engine == "echo" or config.engine == "remote" else config.engine,
        max_batch_size=config.max_batch_size,
        prefix_reuse=config.prefix_reuse,
        prefix_cache_bytes=config.prefix_cache_bytes,
        speculation=config.speculation,
        embeddings=config.embeddings,
    )
