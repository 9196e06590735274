"""A model in memory, as the loader hands it to a runner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TextGenerationPipeline

from app.grammars.vocabulary import Vocabulary
from app.worker.execution.linear_modules import LinearShape
from app.worker.sampling.generation_rules import NO_RULES, GenerationRules


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The pipeline and the facts that runners need."""

    pipeline: TextGenerationPipeline
    revision: str | None
    """Commit on the hub."""
    device: str
    dtype: str
    context_length: int
    vocab_size: int
    """Entries of the embedding table: a token id at or above it would end the process on a GPU."""
    parameters: int
    end_ids: tuple[int, ...]
    """Any of these ends a completion."""
    pad_id: int
    recommended: tuple[tuple[str, float], ...] = ()
    """Sampling parameters of its generation_config.json, as far as a request can set them too."""
    rules: GenerationRules = NO_RULES
    """What its generation_config.json says of single tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, with them in it."""
    logprob_shift: float | None = None
    """By how much quantization changed log-probabilities, on average; None where there is none."""
    weight_copies: int = 1
    """Forms of the weights that may be in memory at once."""
    linears: Mapping[str, LinearShape] = field(default_factory=dict)
    """The linear layers that an adapter may be for, by their paths, as the model was loaded."""
    vocabulary: Vocabulary | None = None
    """What its tokens write, for grammars; None where that cannot be told, so that no grammar can be enforced."""
    folder: Path | None = None
    """Where its files are."""
