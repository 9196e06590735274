"""The LoRA adapters of one loaded model: read when the API process says so, and handed to the runner."""

import logging
from pathlib import Path
from typing import Protocol

import torch

from app.ipc.messages import AdapterFailed, AdapterLoaded, LoadAdapter, UnloadAdapter
from app.worker.execution.lora import LoraAdapter
from app.worker.loaded_model import LoadedModel
from app.worker.loading.adapter_files import AdapterTarget, read_adapter
from app.worker.loading.model_files import LoadError, one_line

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 400
"""Of the line that says why an adapter cannot be loaded."""


class AdapterRunner(Protocol):
    """The part of a runner that takes adapters."""

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """Let requests use an adapter."""

    def remove_adapter(self, digest: str) -> None:
        """End what still uses an adapter, and let go of its weights."""


class AdapterLoader:
    """Answers the messages about adapters."""

    def __init__(self, loaded: LoadedModel, runner: AdapterRunner) -> None:
        self._target = AdapterTarget(loaded.linears, loaded.pipeline.model.dtype, loaded.device)
        self._runner = runner

    def load(self, message: LoadAdapter) -> AdapterLoaded | AdapterFailed:
        """Read an adapter between two steps of the model, whose requests wait meanwhile."""
        try:
            adapter, base = read_adapter(
                Path(message.config_file), Path(message.weights_file), self._target, max_rank=message.max_rank
            )
        except LoadError as error:
            return AdapterFailed(message.id, one_line(error, MAX_REASON_CHARS))
        except (torch.OutOfMemoryError, MemoryError):
            return AdapterFailed(message.id, "it does not fit into memory")
        except Exception as error:
            log.exception("an adapter could not be loaded")
            return AdapterFailed(message.id, f"it cannot be read ({type(error).__name__})")
        if message.digest not in (None, adapter.digest):
            return AdapterFailed(message.id, "its files have changed since it was loaded")
        self._runner.add_adapter(adapter)
        return AdapterLoaded(message.id, adapter.digest, adapter.rank, adapter.parameters, base)

    def unload(self, message: UnloadAdapter) -> None:
        """End what still uses an adapter, and free its memory."""
        self._runner.remove_adapter(message.digest)
