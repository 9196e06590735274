"""A model that generates, as one that embeds: the hidden states behind its last layer, pooled and normalized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from app.embeddings import EmbeddingInfo
from app.worker.embedding.encoder import pad_right
from app.worker.embedding.pooling import Head, normalize
from app.worker.execution import private_api
from app.worker.loaded_model import LoadedModel
from app.worker.loading.model_files import LoadError, one_line

POOLING = {"mean": "mean", "last": "lasttoken"}
"""`model.embeddings` -> pooling."""
MAX_REASON_CHARS = 300


class CausalEncoder:
    """Runs the model's own forward pass, without KV cache; an `Encoder`."""

    def __init__(self, loaded: LoadedModel, pooling: Literal["mean", "last"], *, attention: str | None) -> None:
        """Args:
        attention: name of the attention function that the model had when it was loaded; None: it still has it.
        Raises: LoadError: the model has no hidden states that could be read.
        """
        self._model: Any = loaded.pipeline.model
        self._attention = attention
        self._pad_id = loaded.pad_id
        self._device = loaded.device
        self.vocab_size = loaded.vocab_size
        self.head = Head((POOLING[pooling],), (normalize,))
        self.info = EmbeddingInfo(
            dimension=self._probe(),
            max_tokens=loaded.context_length,
            pooling=self.head.pooling,
            normalized=True,
        )

    def pad(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return texts as token ids and mask."""
        return pad_right(token_ids, self._pad_id, self._device)

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Run the model's body with its own attention."""
        with self._own_attention():
            body = self._model.base_model
            states: Tensor = body(input_ids=token_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            return states

    @contextmanager
    def _own_attention(self) -> Iterator[None]:
        """Take the attention over KV cache slots out of the model for a pass."""
        if self._attention is None:
            yield
            return
        served = private_api.attention_implementation(self._model)
        self._model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._model.set_attn_implementation(served)

    @torch.inference_mode()
    def _probe(self) -> int:
        try:
            ids, mask = self.pad([[0]])
            (vector,) = self.head(self.hidden_states(ids, mask), mask, [None])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error, MAX_REASON_CHARS)}"
            raise LoadError(f"model.embeddings: this model has no hidden states to read ({reason})") from error
        return len(vector)
