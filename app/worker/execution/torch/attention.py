"""Attention over KV cache slots in torch's scaled dot-product attention.

Groups the tokens of a batch so that few calls compute it: the decode tokens of neighbouring slots together, and each
prefill segment by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.worker.execution.base import AttentionSpec
from app.worker.execution.dot_product import additive_mask, scaled_dot_product
from app.worker.execution.packed_batch import PackedBatch, Segment

CALL_COST = 1500
"""The cost of one more attention call, in keys read: about 15 us beside 10 ns for each key of a slot."""


class AttentionGroup(Protocol):
    """Tokens whose attention is computed in one call."""

    @property
    def tokens(self) -> slice:
        """Their indices in the batch."""

    @property
    def slots(self) -> slice:
        """Their KV cache slots."""

    @property
    def end(self) -> int:
        """The key after the last that any of them sees."""

    def first(self, window: int | None) -> int:
        """Return the first key that any of them sees."""

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return the additive mask, 0 or -inf; None where the group's default mask is right."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-query attention of neighbouring slots, one token each; by default each token sees all keys."""

    tokens: slice
    slots: slice
    ends: tuple[int, ...]
    """Keys of each slot, its new one included."""
    positions: Tensor
    """(slots,) of the tokens."""

    @property
    def end(self) -> int:
        return max(self.ends)

    def first(self, window: int | None) -> int:
        return 0 if window is None else max(0, min(self.ends) - window)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return (slots, 1, 1, keys)."""
        if min(self.ends) == max(self.ends):
            return None
        return _window_mask(self.positions, self.first(window), self.end, window, like)[:, None, None]


@dataclass(frozen=True, slots=True)
class PrefillSegment:
    """Several tokens of one slot; by default each sees itself and all before it."""

    tokens: slice
    segment: Segment
    positions: Tensor
    """(tokens,)"""

    @property
    def slots(self) -> slice:
        return slice(self.segment.slot, self.segment.slot + 1)

    @property
    def end(self) -> int:
        return self.segment.end

    def first(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.segment.start + 1 - window)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return (tokens, keys)."""
        if self.segment.start == 0 and (window is None or self.end <= window):
            return None
        return _window_mask(self.positions, self.first(window), self.end, window, like)


class AttentionMetadata:
    """The groups of one batch and their masks, computed once for all layers."""

    def __init__(self, batch: PackedBatch) -> None:
        decodes = [segment for segment in batch.segments if len(segment.token_ids) == 1]
        prefills, positions = batch.segments[len(decodes) :], batch.positions[0]
        self.groups: list[AttentionGroup] = [
            *_decode_groups(decodes, positions),
            *_prefill_segments(prefills, len(decodes), positions),
        ]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def mask(self, index: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return the mask of a group."""
        if (index, window) not in self._masks:
            self._masks[index, window] = self.groups[index].mask(window, like)
        return self._masks[index, window]


class TorchAttention:
    """The attention backend for every device and type."""

    def __init__(self) -> None:
        self._batch: PackedBatch | None = None
        self._metadata: AttentionMetadata | None = None

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""
        storage[batch.slots, :, batch.positions[0]] = states[0].transpose(0, 1)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        """Attend each token of `query`, (tokens, heads, size), to its own slot of one layer's keys and values."""
        metadata = self._metadata_of(batch)
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        for index, group in enumerate(metadata.groups):
            visible = slice(group.first(spec.sliding_window), group.end)
            mask = metadata.mask(index, spec.sliding_window, query)
            k, v = keys[group.slots, :, visible], values[group.slots, :, visible]
            out[group.tokens] = _attend_group(group, query[group.tokens], k, v, mask, scale, spec.softcap)
        return out

    def _metadata_of(self, batch: PackedBatch) -> AttentionMetadata:
        if self._metadata is None or self._batch is not batch:
            self._batch, self._metadata = batch, AttentionMetadata(batch)
        return self._metadata


def _decode_groups(decodes: Sequence[Segment], positions: Tensor) -> list[DecodeGroup]:
    """Group decode tokens of neighbouring slots so that calls and keys read in vain together cost least.

    Dynamic programming over the last group's first token.
    """
    lengths = [segment.end for segment in decodes]
    # The first of the tokens up to the last whose slots have no gap between them.
    neighbours = 0
    costs, cuts = [0], [0]
    for last, length in enumerate(lengths):
        if last and decodes[last - 1].slot + 1 != decodes[last].slot:
            neighbours = last
        longest, best, cut = length, costs[last] + length, last
        for begin in range(last - 1, neighbours - 1, -1):
            if lengths[begin] > longest:
                longest = lengths[begin]
            cost = costs[begin] + (last + 1 - begin) * longest
            if cost < best:
                best, cut = cost, begin
        costs.append(best + CALL_COST)
        cuts.append(cut)
    groups: list[DecodeGroup] = []
    end = len(decodes)
    while end:
        begin = cuts[end]
        slots = slice(decodes[begin].slot, decodes[end - 1].slot + 1)
        ends = tuple(lengths[begin:end])
        groups.append(DecodeGroup(slice(begin, end), slots, ends, positions[begin:end]))
        end = begin
    return groups


def _prefill_segments(segments: Sequence[Segment], offset: int, positions: Tensor) -> list[PrefillSegment]:
    """Return the prefill segments with their indices in the batch, from `offset` on."""
    groups: list[PrefillSegment] = []
    for segment in segments:
        tokens = slice(offset, offset + len(segment.token_ids))
        groups.append(PrefillSegment(tokens, segment, positions[tokens]))
        offset = tokens.stop
    return groups


def _window_mask(positions: Tensor, first: int, end: int, window: int | None, like: Tensor) -> Tensor:
    """Return the additive mask, (positions, keys from `first` to `end`)."""
    keys, last = torch.arange(first, end, device=like.device), positions[:, None]
    visible = keys <= last
    if window is not None:
        visible &= keys > last - window
    return additive_mask(visible, like)


def _attend_group(
    group: AttentionGroup, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attend (tokens, heads, size) to (slots, KV heads, keys, size) without repeating keys, like `q`."""
    tokens, heads, size = q.shape
    query_groups = heads // k.shape[1]
    folded = q.view(tokens, heads // query_groups, query_groups, size)
    if isinstance(group, DecodeGroup):
        # The query heads of one KV head are computed as one block, as if they were so many queries.
        return scaled_dot_product(folded, k, v, mask, scale, softcap, causal=False).flatten(1, 2)
    # The query heads of one KV head as so many batches over the same keys.
    shared_k, shared_v = k.expand(query_groups, -1, -1, -1), v.expand(query_groups, -1, -1, -1)
    out = scaled_dot_product(folded.permute(2, 1, 0, 3), shared_k, shared_v, mask, scale, softcap, causal=True)
    return out.permute(2, 1, 0, 3).flatten(1, 2)
