"""The KV cache: a fixed number of slots, each for one sequence's keys and values, for all layers of a model.

A forward pass computes all its tokens as one sequence of shape (1, tokens), each with its own position.  The linear
layers see one large batch; here each token's keys and values go to its sequence's slot, and an attention backend lets
each query attend to its own slot only.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from app.worker.execution.base import AttentionBackend, AttentionSpec, BlockCopier, UnsupportedModelError
from app.worker.execution.packed_batch import PackedBatch, Segment


class KVCache(Cache):
    """The keys and values of all slots.

    A layer's storage is allocated when the layer first computes something: (slots, KV heads, length, head size), zero
    pages that take memory only as they are written.
    """

    is_compileable = False

    def __init__(self, slots: int, length: int, device: str, attention: AttentionBackend) -> None:
        """Args: length: tokens that fit a slot."""
        super().__init__(layers=[])
        self.slots = slots
        self.length = length
        self.attention = attention
        self.specs: dict[int, AttentionSpec] = {}
        """Attention parameters by layer; complete after the first pass."""
        self.write_in_attention = False
        """Whether the attention function itself calls `write`, and `update` returns its arguments."""
        self.device = torch.device(device)
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}
        self.make_block_copier: Callable[[Sequence[tuple[Tensor, Tensor]]], BlockCopier] = TorchBlockCopier
        """Makes what copies to and from the prefix cache, of the slots' keys or values in a layer, and the blocks'."""
        self._block_copier: BlockCopier = TorchBlockCopier(())
        self._batch: PackedBatch | None = None
        self._layer = 0

    @property
    def bytes_per_token(self) -> int:
        """Size of one token's keys and values in all layers that have computed something."""
        return self.total_bytes // (self.slots * self.length)

    @property
    def total_bytes(self) -> int:
        """Size of all slots in all layers that have computed something."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._storage.values() for tensor in pair)

    def pack(self, segments: Sequence[Segment], wanted: Sequence[int]) -> PackedBatch:
        """Return the batch of the next forward pass, which has to follow.

        Args:
            segments: decode tokens first, by slot; then prefill chunks; every slot at most once.
            wanted: for each segment, after how many of its last tokens the logits are needed; one where it is True.
        Raises: IndexError: a segment lies outside of the slots.
        """
        # The native kernels write wherever the batch says.
        if any(not 0 <= each.slot < self.slots or each.start < 0 or each.end > self.length for each in segments):
            raise IndexError("a segment lies outside of the KV cache slots")
        self._batch = PackedBatch(segments, wanted, self.device)
        return self._batch

    @contextmanager
    def reading(self, batch: PackedBatch, attention: AttentionBackend) -> Iterator[None]:
        """Let the forward passes within be of this batch, and attend by this backend."""
        before = self._batch, self.attention
        self._batch, self.attention = batch, attention
        try:
            yield
        finally:
            self._batch, self.attention = before

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of the first `count` tokens of a slot to another."""
        for pair in self._storage.values():
            for tensor in pair:
                tensor[target, :, :count] = tensor[source, :, :count]

    def shrink(self, slots: int) -> None:
        """Keep fewer slots, all of them empty, and give the memory of the others back; before there is a prefix cache.

        Whoever reads the tensors of `layer` has to ask for them again.
        """
        self.slots = slots
        for layer in self._storage:
            shapes = [(like.shape, like.new_empty(0)) for like in self._storage[layer]]
            # The old ones go before the new ones come: there may be no memory for both.
            self._storage[layer] = shapes[0][1], shapes[1][1]
            self.release_memory()
            keys, values = (self._zeros((slots, *shape[1:]), like) for shape, like in shapes)
            self._storage[layer] = keys, values

    def add_prefix_cache(self, max_bytes: int, block_tokens: int) -> int:
        """Allocate the blocks of the prefix cache; every layer must have computed something.

        Returns: how many there are.
        """
        count = max_bytes // max(1, self.bytes_per_token * block_tokens)
        storages = [tensor for pair in self._storage.values() for tensor in pair]
        if count and storages:
            shapes = [(count, storage.shape[1], block_tokens, storage.shape[3]) for storage in storages]
            blocks = [_zeros(shape, storage) for shape, storage in zip(shapes, storages, strict=True)]
            self._block_copier = self.make_block_copier(list(zip(storages, blocks, strict=True)))
        return count

    @torch.inference_mode()
    def save_prefix(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy the keys and values of a slot, from the token `start` on, to blocks of the prefix cache."""
        self._block_copier.save(slot, start, blocks)

    @torch.inference_mode()
    def restore_prefix(self, blocks: Sequence[int], slot: int) -> None:
        """Copy blocks of the prefix cache to the beginning of a slot."""
        self._block_copier.restore(blocks, slot)

    def release_memory(self) -> None:
        """Give memory that is kept for later passes back to the device, so that it can be had in other pieces."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def clear_slot(self, slot: int) -> None:
        """Zero a slot: a NaN would spoil even attention that masks it."""
        for pair in self._storage.values():
            for tensor in pair:
                tensor[slot] = 0

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, (slots, KV heads, length, head size) each.

        Raises: KeyError: the layer has not computed anything yet.
        """
        return self._storage[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values, each (1, KV heads, tokens, head size); return what attention is to be handed."""
        if self.write_in_attention:
            return key_states, value_states
        return self.write(key_states, value_states, layer_idx)

    def write(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write new keys and values, each (1, KV heads, tokens, head size), to their slots; return the layer's all."""
        batch = self._batch
        if batch is None or key_states.shape[0] != 1 or key_states.shape[2] != batch.size:
            raise UnsupportedModelError("it does not keep one key and value for each token")
        if layer_idx not in self._storage:
            self._storage[layer_idx] = self._allocate(key_states), self._allocate(value_states)
        self._layer = layer_idx
        keys, values = self._storage[layer_idx]
        self.attention.write(key_states, keys, batch)
        self.attention.write(value_states, values, batch)
        return keys, values

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend each token of `query`, (1, heads, tokens, head size), to its own slot of a layer's keys and values.

        Args:
            scaling: of the scores; None is 1 / sqrt(head size).
            sliding_window: keys that a token sees, its own included; None is no limit.
            softcap: bounds the scores by `softcap * tanh(score / softcap)`.
        Returns: (1, tokens, heads, head size).
        """
        batch = self._batch
        assert batch is not None  # noqa: S101  # `write` has checked it
        if self._layer not in self.specs:
            self.specs[self._layer] = _spec(query, keys, values, sliding_window, softcap)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        spec = self.specs[self._layer]
        return self.attention.attend(query[0].transpose(0, 1), keys, values, batch, spec, scale)[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given, never counted on from the cache."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Satisfy transformers' interface; with this attention it creates no masks."""
        return query_length, 0

    def _allocate(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        return self._zeros((self.slots, heads, self.length, size), like)

    def _zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        storage = _zeros(shape, like)
        # Attention functions get no cache from transformers; this leads back to it from the keys.
        storage.kv_cache = self  # type: ignore[attr-defined]
        return storage


class TorchBlockCopier:
    """Copies keys and values between slots and blocks layer by layer, on any device."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Args:
        tensors: of each layer the slots' keys, (slots, KV heads, length, size), and the blocks', (blocks, KV heads,
            tokens of a block, size), and the same of its values.
        """
        self._tensors = tensors

    def save(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a slot, from the token `start` on, to blocks."""
        index = torch.tensor(blocks, device=self._tensors[0][0].device)
        for storage, stored in self._tensors:
            whole, rest = divmod(min(storage.shape[2] - start, len(blocks) * stored.shape[2]), stored.shape[2])
            stored.index_copy_(0, index[:whole], _in_blocks(storage[slot, :, start:], whole, stored.shape[2]))
            if rest:  # the slot ends within the last block
                stored[blocks[-1], :, :rest] = storage[slot, :, -rest:]

    def restore(self, blocks: Sequence[int], slot: int) -> None:
        """Copy blocks to the beginning of a slot."""
        index = torch.tensor(blocks, device=self._tensors[0][0].device)
        for storage, stored in self._tensors:
            whole, rest = divmod(min(storage.shape[2], len(blocks) * stored.shape[2]), stored.shape[2])
            torch.index_select(stored, 0, index[:whole], out=_in_blocks(storage[slot], whole, stored.shape[2]))
            if rest:
                storage[slot, :, -rest:] = stored[blocks[-1], :, :rest]


def _spec(query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None) -> AttentionSpec:
    return AttentionSpec(
        query_heads=query.shape[1],
        kv_heads=keys.shape[1],
        key_size=keys.shape[-1],
        value_size=values.shape[-1],
        dtypes=frozenset({query.dtype, keys.dtype, values.dtype}),
        device=query.device.type,
        sliding_window=window,
        softcap=softcap,
    )


def _in_blocks(states: Tensor, count: int, tokens: int) -> Tensor:
    """Return the first tokens of `states`, (KV heads, tokens, size), as (count, KV heads, tokens of a block, size)."""
    heads, _, size = states.shape
    return states[:, : count * tokens].view(heads, count, tokens, size).transpose(0, 1)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the type and on the device of `like`; on the host a page takes memory once it is written."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    # `torch.zeros` writes its zeros, and so takes all memory at once; fresh pages of the system are zero already.
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
