"""Defines the settings of the model that embeds texts."""

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from app.config.section import Section

EmbeddingPooling = Literal["none", "mean", "last"]


class EmbeddingsConfig(Section):
    """A model beside the chat model that turns texts into vectors, served by POST /v1/embeddings."""

    model: str = ""
    """A folder (source local) or a Hugging Face model id (source hub) of an encoder, best in the layout of
    sentence-transformers; empty: none is loaded."""
    source: Literal["local", "hub"] = "local"
    """local (a folder) or hub."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is a CUDA or Apple GPU where there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type, as for `model.dtype`; the vectors are float32."""
    revision: str | None = None
    """Commit or tag of the model on the hub."""
    max_tokens: PositiveInt | None = None
    """Tokens of the longest text; unset is the model's own, which is also the maximum."""
    max_batch_tokens: PositiveInt = 4096
    """Tokens of the texts that are computed at once, with their padding; a longer text is computed by itself."""
    max_waiting_tokens: PositiveInt = 1_048_576
    """Tokens of one tenant's texts that may wait or be computed while no other tenant's do; further requests get 503.
    A single request may always wait."""
    matryoshka: bool | None = None
    """Whether vectors may be cut to any number of `dimensions`; unset: as far as the model's config.json says so."""
    threads: NonNegativeInt = 0
    """CPU threads of the model; 0 is one per core."""

    @property
    def public_name(self) -> str:
        """The name that clients see: the model id, or the name of the folder without its path; empty for none."""
        return Path(self.model).resolve().name if self.model and self.source == "local" else self.model
