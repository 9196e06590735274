"""Rows of KV cache, and attention over them: one forward pass computes the next tokens of many sequences.

A forward pass gets all its tokens as one sequence of shape (1, tokens), each with its own position.  The linear layers
see one big batch; here the keys and values go to their rows, and each query attends to its own row only.  Works for
every model that hands its attention to transformers' `AttentionInterface` and rotates or embeds by `position_ids`.
"""

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from app.worker.execution.native.attention import KV_CACHE_TYPES, AttentionShape, NativeAttention
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.packed_batch import Group, Layout, Piece, Singles, additive

ATTENTION = "rows"
"""The name under which the attention is known to transformers."""
HARMLESS = frozenset({"position_ids", "cache_position"})
"""Tensors that attention functions are shown but do not need."""


class UnsupportedModelError(Exception):
    """The model computes attention in a way that rows cannot; the message says which."""


class RowCache(Cache):
    """The keys and values of all rows, for all layers of one model.

    A layer's storage is made when the layer first computes something: (rows, KV heads, length, head size), zero pages
    that take memory only as they are written.
    """

    is_compileable = False

    def __init__(self, rows: int, length: int, device: str) -> None:
        """Args: length: tokens that fit a row."""
        super().__init__(layers=[])
        self.rows = rows
        self.length = length
        self.windows: dict[int, int | None] = {}
        """By layer, the sliding window in tokens that it told the attention, or None; known after the first pass."""
        self.heads: set[AttentionShape | None] = set()
        """The shapes of attention in the layers that have computed something; None is one that cannot be compiled."""
        self.compiled: NativeAttention | None = None
        """Computes attention instead of torch, if there is one."""
        self.outside = False
        """Whether attention itself calls `write`, and `update` only hands on what it gets."""
        self._device = torch.device(device)
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}
        self._layout: Layout | None = None
        self._layer = 0

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values of all layers that have computed something."""
        each = (tensor.numel() * tensor.element_size() for pair in self._storage.values() for tensor in pair)
        return sum(each) // (self.rows * self.length)

    def prepare(self, pieces: Sequence[Piece]) -> Layout:
        """Lay out the next forward pass, which has to follow.

        Args: pieces: single tokens first, by row; then longer ones; every row at most once.
        Raises: IndexError: a piece lies outside of the rows.
        """
        # The compiled attention writes where it is told to.
        if any(not 0 <= piece.row < self.rows or piece.start < 0 or piece.end > self.length for piece in pieces):
            raise IndexError("a piece lies outside of the rows")
        self._layout = Layout(pieces, self._device)
        return self._layout

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of the first `count` tokens of a row to another."""
        for pair in self._storage.values():
            for tensor in pair:
                tensor[target, :, :count] = tensor[source, :, :count]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Forget a row's numbers: one that is no number would spoil even those that are masked."""
        for pair in self._storage.values():
            for tensor in pair:
                tensor[row] = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values, each (1, KV heads, tokens, head size); return what attention is to be handed."""
        if self.outside:
            return key_states, value_states
        return self.write(key_states, value_states, layer_idx)

    def write(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, each (1, KV heads, tokens, head size), to their rows; return a layer's all."""
        if self._layout is None or key_states.shape[0] != 1 or key_states.shape[2] != self._layout.ids.shape[1]:
            raise UnsupportedModelError("it does not keep one key and value for each token")
        if layer_idx not in self._storage:
            self._storage[layer_idx] = self._make(key_states), self._make(value_states)
        keys, values = self._storage[layer_idx]
        self._layer = layer_idx
        rows, positions = self._layout.rows, self._layout.positions[0]
        if self.compiled is not None:
            self.compiled.write_kv(key_states, keys, rows, positions)
            self.compiled.write_kv(value_states, values, rows, positions)
        else:
            keys[rows, :, positions] = key_states[0].transpose(0, 1)
            values[rows, :, positions] = value_states[0].transpose(0, 1)
        return keys, values

    def compile(self) -> None:
        """Attend by a program made for this model from the next pass on.

        Raises: CompileError: there is none for it; everything goes on as before.
        """
        self.compiled = NativeAttention(self.same_heads())

    def same_heads(self) -> AttentionShape:
        """Return the shape of attention in all layers that have computed something.

        Raises: CompileError: they have none in common that can be compiled.
        """
        heads = next(iter(self.heads)) if len(self.heads) == 1 else None
        if heads is None:
            raise CompileError("its attention is not of one kind, or in no type that there is a program for")
        return heads

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer that has computed something, (rows, KV heads, length, head size) each."""
        return self._storage[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given, never counted on from the cache."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Never of use: with this attention transformers makes no masks."""
        return query_length, 0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend each token of `query` (1, heads, tokens, head size) to its own row of a layer's keys and values.

        Args:
            scaling: of the scores; None is 1 / sqrt(head size).
            sliding_window: a token sees itself and the keys before it, so many in all; None is no limit.
            softcap: bounds the scores by `softcap * tanh(score / softcap)`.
        Returns: (1, tokens, heads, head size).
        """
        layout = self._layout
        assert layout is not None  # noqa: S101  # `update` has looked
        if self._layer not in self.windows:
            self.windows[self._layer] = sliding_window
            self.heads.add(_heads(query, key, value) if softcap is None else None)
        _, heads, tokens, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        q = query[0].transpose(0, 1)
        out = q.new_empty(tokens, heads, value.shape[-1])
        if self.compiled is not None:
            self.compiled.attend(q, key, value, out, layout.rows, layout.seen(sliding_window), scale)
            return out[None]
        for number, group in enumerate(layout.groups):
            seen = slice(group.first(sliding_window), group.end)
            mask = layout.mask(number, sliding_window, q)
            k, v = key[group.rows, :, seen], value[group.rows, :, seen]
            out[group.tokens] = _attend_group(group, q[group.tokens], k, v, mask, scale, softcap)
        return out[None]

    def _make(self, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        made = _zeros((self.rows, heads, self.length, size), like)
        # The way from a layer's attention, which is called by transformers, back to the rows.
        made.row_cache = self  # type: ignore[attr-defined]
        return made


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the type and on the device of `like`; on the host a page takes memory once it is written."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    # `torch.zeros` writes its zeros, and so takes all memory at once; fresh pages of the system are zero already.
    pages = mmap.mmap(-1, math.prod(shape) * like.element_size(), access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _attend_group(
    group: Group, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attend (tokens, heads, size) to (rows, KV heads, keys, size) by torch, and repeat no keys; like `q`."""
    tokens, heads, size = q.shape
    groups = heads // k.shape[1]
    folded = q.view(tokens, heads // groups, groups, size)
    if isinstance(group, Singles):
        # All query heads of one KV head together, as if they were so many queries.
        return _dot(folded, k, v, mask, scale, softcap, causal=False).flatten(1, 2)
    # The query heads of one KV head as so many batches over the same keys.
    several = k.expand(groups, -1, -1, -1), v.expand(groups, -1, -1, -1)
    part = _dot(folded.permute(2, 1, 0, 3), *several, mask, scale, softcap, causal=True)
    return part.permute(2, 1, 0, 3).flatten(1, 2)


def _heads(query: Tensor, key: Tensor, value: Tensor) -> AttentionShape | None:
    """Return the shape of attention between numbers of the CPU, keys and values alike; None if it is not compiled."""
    alike = key.shape == value.shape and key.shape[-1] == query.shape[-1]
    kinds = {(each.dtype, each.device.type) for each in (query, key, value)}
    if not alike or len(kinds) > 1 or query.dtype not in KV_CACHE_TYPES or query.device.type != "cpu":
        return None
    return AttentionShape(key.shape[1], query.shape[1] // key.shape[1], query.shape[-1], query.dtype)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer, in its own signature.

    Raises: UnsupportedModelError: the model asks for something that is not computed here.
    """
    strange = sorted(name for name, each in others.items() if isinstance(each, Tensor) and name not in HARMLESS)
    cache: RowCache | None = getattr(key, "row_cache", None)
    if cache is None or attention_mask is not None or strange:
        raise UnsupportedModelError(f"its attention needs {', '.join(strange) or 'keys or a mask of its own'}")
    return cache.attend(query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(ATTENTION, _attend)


def _dot(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, *, causal: bool
) -> Tensor:
    """Scaled dot-product attention of (batch, heads, queries, size) over (batch, heads, keys, size)."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale
        )
    scores = torch.tanh((q @ k.mT) * scale / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    elif causal:
        scores = scores + additive(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), q)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
