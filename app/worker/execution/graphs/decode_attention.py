"""Attention of one token in each of some slots, in operators whose shapes do not depend on the tokens' positions."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from app.worker.execution.base import AttentionBackend, AttentionSpec
from app.worker.execution.dot_product import additive_mask, scaled_dot_product
from app.worker.execution.packed_batch import PackedBatch

COPY_COST = 3
"""Reading a key of a slot that is copied first takes so many times as long as reading it where it lies."""


class PassAttention(AttentionBackend, Protocol):
    """An attention backend whose operators have the same shapes wherever the tokens of a batch are."""

    def one_pass(self) -> AbstractContextManager[None]:
        """Keep what the layers of one pass share while that is computed."""


def write_tokens(states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
    """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""
    storage[batch.slots, :, batch.positions[0]] = states[0].transpose(0, 1)


def masked_attention(rows: int, keys: int, slots: int) -> "DecodeAttention":
    """Return masked attention of so many rows to the first keys of their slots, read in the faster way."""
    return DecodeAttention(keys, whole=COPY_COST * rows >= slots)


class DecodeAttention:
    """The attention backend of a pass that can be captured: what a token does not see is masked, not left out."""

    def __init__(self, keys: int, *, whole: bool) -> None:
        """Args:
        keys: read of each slot, from the first.
        whole: whether all slots are read where they lie; else those of the batch are copied first.
        """
        self._keys = keys
        self._whole = whole
        self._masks: dict[int | None, Tensor] = {}

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Keep the masks of the pass within for all of its layers, and no longer: graphs share their memory."""
        self._masks.clear()
        yield
        self._masks.clear()

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""
        write_tokens(states, storage, batch)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        """Attend each token of `query`, (tokens, heads, size), to its own slot of one layer's keys and values."""
        tokens, heads, size = query.shape
        # The query heads of one KV head are computed as one block, as if they were so many queries.
        folded = query.view(tokens, keys.shape[1], heads // keys.shape[1], size)
        k, v = keys[:, :, : self._keys], values[:, :, : self._keys]
        mask = self._mask(batch, spec.sliding_window, len(keys), query)
        if self._whole:
            spread = folded.new_zeros((len(keys), *folded.shape[1:])).index_copy_(0, batch.slots, folded)
            out = scaled_dot_product(spread, k, v, mask, scale, spec.softcap, causal=False)
            out = out.index_select(0, batch.slots)
        else:
            k, v = k.index_select(0, batch.slots), v.index_select(0, batch.slots)
            out = scaled_dot_product(folded, k, v, mask, scale, spec.softcap, causal=False)
        return out.flatten(1, 2)

    def _mask(self, batch: PackedBatch, window: int | None, slots: int, like: Tensor) -> Tensor:
        """Return the additive mask, (rows, 1, 1, keys), computed once for all layers."""
        if window not in self._masks:
            last = batch.positions[0]
            if self._whole:
                # A slot without a token sees its first key: a row without any would be NaN.
                last = last.new_zeros(slots).index_copy_(0, batch.slots, last)
            keys, last = torch.arange(self._keys, device=like.device), last[:, None]
            visible = keys <= last
            if window is not None:
                visible = visible & (keys > last - window)
            self._masks[window] = additive_mask(visible, like)[:, None, None]
        return self._masks[window]
