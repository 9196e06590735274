"""Builds the `Ready` message, by which the parent process learns what has been loaded."""

from typing import Protocol

import torch

from app.ipc.messages import Compiled, Ready
from app.types import StepTimes
from app.worker.embedding.encoder import LoadedEncoder
from app.worker.loaded_model import LoadedModel


class DescribedRunner(Protocol):
    """The part of a runner that says what it does."""

    @property
    def name(self) -> str:
        """Its name in `EngineInfo.engine`."""

    @property
    def slots(self) -> int:
        """Requests that run at once."""

    @property
    def context_length(self) -> int:
        """Tokens that fit a request."""

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields of `SamplingParams` that it cannot honour."""

    @property
    def compiled(self) -> Compiled | None:
        """Operators compiled for this machine."""

    @property
    def step_times(self) -> tuple[StepTimes, ...]:
        """What steps take in each way of execution, where that was measured."""


def model_ready(tokenizer_folder: str, loaded: LoadedModel, runner: DescribedRunner) -> Ready:
    """Return the description of a model that generates."""
    return Ready(
        tokenizer_folder=tokenizer_folder,
        runner=runner.name,
        slots=runner.slots,
        revision=loaded.revision,
        device=loaded.device,
        dtype=loaded.dtype,
        context_length=runner.context_length,
        vocab_size=loaded.vocab_size,
        parameters=loaded.parameters,
        unsupported=runner.unsupported,
        recommended=loaded.recommended,
        stop_strings=loaded.stop_strings,
        rules=loaded.rules.digest,
        logprob_shift=loaded.logprob_shift,
        compiled=runner.compiled,
        step_times=runner.step_times,
        folder=None if loaded.folder is None else str(loaded.folder),
        device_bytes=torch.cuda.memory_reserved() if loaded.device == "cuda" else None,
        device_total_bytes=torch.cuda.mem_get_info()[1] if loaded.device == "cuda" else None,
    )


def encoder_ready(tokenizer_folder: str, encoder: LoadedEncoder) -> Ready:
    """Return the description of a model that embeds and does nothing else."""
    return Ready(
        tokenizer_folder=tokenizer_folder,
        runner="encoder",
        slots=1,
        revision=encoder.revision,
        device=encoder.device,
        dtype=encoder.dtype,
        context_length=encoder.info.max_tokens,
        vocab_size=encoder.vocab_size,
        parameters=encoder.parameters,
        folder=str(encoder.folder),
        embedding=encoder.info,
    )
