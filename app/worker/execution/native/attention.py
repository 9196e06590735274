"""Attention over the KV cache in C++, compiled when a model is loaded, for its heads and this processor.

torch's scaled dot-product attention is optimised for many queries over the same keys; for one new token of each slot,
and for segments of prompts, it spends much of its time on thousands of small matrix products.  Keys and values are
float32 or bfloat16, on a CPU.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.worker.execution.base import AttentionSpec
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.native.native_build import CompileError, build_kernel_library
from app.worker.execution.packed_batch import PackedBatch

LANES = 8
"""Elements of a SIMD vector; the head size is a multiple of it."""
KV_CACHE_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
"""Types of keys and values, and what the C++ sources call them."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error against torch that the self-test accepts."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The shape of attention in every layer of a model."""

    num_kv_heads: int
    queries_per_kv: int
    """Query heads that share one KV head (grouped-query attention)."""
    head_size: int
    dtype: torch.dtype = torch.float32
    """Type of keys, values and the output."""

    @property
    def macros(self) -> dict[str, str | int]:
        """Return the macros that a kernel library for this shape is compiled with.

        Raises: CompileError: the kernels do not support this head size.
        """
        if self.head_size % LANES:
            raise CompileError(f"heads of {self.head_size} numbers do not fill vectors")
        return {
            "LLMK_NUM_KV_HEADS": self.num_kv_heads,
            "LLMK_QUERIES_PER_KV": self.queries_per_kv,
            "LLMK_HEAD_SIZE": self.head_size,
            "LLMK_KV_TYPE": KV_CACHE_TYPES[self.dtype],
        }


def common_shape(cache: KVCache) -> AttentionShape:
    """Return the shape of attention in all layers of the model that has written to a KV cache.

    Raises: CompileError: the layers differ, or the kernels do not support them.
    """
    shapes = {_shape(spec) for spec in cache.specs.values()}
    shape = shapes.pop() if len(shapes) == 1 else None
    if shape is None:
        raise CompileError("its attention is not of one kind, or in no type that there is a kernel for")
    return shape


def _shape(spec: AttentionSpec) -> AttentionShape | None:
    dtype = next(iter(spec.dtypes))
    supported = (
        spec.key_size == spec.value_size
        and len(spec.dtypes) == 1
        and dtype in KV_CACHE_TYPES
        and spec.device == "cpu"
        and spec.softcap is None
    )
    if not supported:
        return None
    return AttentionShape(spec.kv_heads, spec.query_heads // spec.kv_heads, spec.key_size, dtype)


class NativeAttentionBackend:
    """The attention backend of the KV cache that calls the kernels."""

    def __init__(self, shape: AttentionShape) -> None:
        """Raises: CompileError: there is no compiler, or the kernels compute something else than torch."""
        self._kernels = NativeAttention(shape)

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""
        self._kernels.write_kv(states, storage, batch.slots, batch.positions[0])

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        """Attend each token of `query`, (tokens, heads, size), to its own slot of one layer's keys and values."""
        out = query.new_empty(query.shape)
        self._kernels.attend(query, keys, values, out, batch.slots, batch.key_range(spec.sliding_window), scale)
        return out


class NativeAttention:
    """Calls the attention kernels of one model."""

    def __init__(self, shape: AttentionShape) -> None:
        """Build the library and run its self-test.

        Raises: CompileError: there is no compiler, or the kernels compute something else than torch on this machine.
        """
        self._shape = shape
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library = build_kernel_library("attention", shape.macros)
        self._attend, self._write_kv = library.llmk_attend, library.llmk_write_kv
        self._attend.argtypes = [*[pointer] * 7, number, number, ctypes.c_float, ctypes.c_int]
        self._write_kv.argtypes = [pointer, number, number, pointer, pointer, pointer, number, number]
        self._attend.restype = self._write_kv.restype = None
        self._self_test()

    def write_kv(self, states: Tensor, cache: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Write the keys or the values of some tokens to their positions in the KV cache.

        Args:
            states: (1, KV heads, tokens, head size)
            cache: (slots, KV heads, length, head size), one layer's keys or values; written.
            slots, positions: (tokens,) int64
        """
        if states.stride(-1) != 1:
            states = states.contiguous()
        self._write_kv(
            states.data_ptr(),
            states.stride(1),
            states.stride(2),
            cache.data_ptr(),
            slots.data_ptr(),
            positions.data_ptr(),
            len(slots),
            cache.shape[2],
        )

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        slots: Tensor,
        key_range: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        """Compute the attention of each token over its own slot.

        Args:
            q, out: (tokens, heads, head size); `out` is written and contiguous.
            keys, values: (slots, KV heads, length, head size), one layer's.
            slots: (tokens,) int64; neighbouring tokens of one slot share one pass over its keys.
            key_range: first key that each token attends to and one past its last, (tokens,) int64 both; neither
                decreases from one token of a slot to its next.
            scale: factor of the scores.
        """
        q = q.contiguous()
        first, end = key_range
        self._attend(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            slots.data_ptr(),
            first.data_ptr(),
            end.data_ptr(),
            len(slots),
            keys.shape[2],
            scale,
            torch.get_num_threads(),
        )

    def _self_test(self) -> None:
        """Compare single tokens and neighbours of one slot with torch.

        Raises: CompileError: a result differs.
        """
        shape, length, tokens = self._shape, 19, 5
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype)

        keys, values = random(2, tokens + 1, shape.num_kv_heads, length, shape.head_size).unbind()
        q = random(tokens, shape.num_kv_heads * shape.queries_per_kv, shape.head_size)
        new = random(1, shape.num_kv_heads, tokens, shape.head_size)
        slots, first, end = torch.tensor([[3, 0, 2, 2, 2], [0, 4, 0, 0, 1], [1, 17, 17, 18, 19]])
        out, scale = torch.empty_like(q), 1 / math.sqrt(shape.head_size)
        self.write_kv(new, keys, slots, end - 1)
        self.attend(q, keys, values, out, slots, (first, end), scale)
        for token, (slot, begin, stop) in enumerate(zip(slots.tolist(), first.tolist(), end.tolist(), strict=True)):
            seen = (each[slot, :, begin:stop].float() for each in (keys, values))
            k, v = (each.repeat_interleave(shape.queries_per_kv, 0) for each in seen)
            expected = (torch.softmax(scale * (k @ q[token, :, :, None].float())[..., 0], -1)[:, None] @ v)[:, 0]
            written = torch.equal(keys[slot, :, stop - 1], new[0, :, token])
            if not written or not (out[token] - expected).norm() <= TOLERANCE[shape.dtype] * expected.norm():
                raise CompileError("the compiled attention computes something else")
