"""Attention of one token in each of some slots as a Triton kernel, which reads only the keys that each token sees.

Split over keys (flash-decoding): the keys of each row are divided among a fixed number of programs, and a second kernel
combines what they found.  How many programs are launched does not depend on where the tokens are, so that a captured
pass serves sequences of any length.  Importing this module needs Triton, which torch's CUDA wheels bring along.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from app.worker.execution.base import AttentionSpec, ExecutorUnavailableError
from app.worker.execution.graphs.decode_attention import write_tokens
from app.worker.execution.graphs.split_kv_kernels import attend_part, combine_parts
from app.worker.execution.packed_batch import PackedBatch

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
MIN_BLOCK = 16
"""The least numbers of rows, columns and products that matrix instructions take; less is filled up with zeros."""
MAX_BLOCK_KEYS = 64
BLOCK_BYTES = 32 << 10
"""Of keys and values that a program reads at once."""
SHARED_BYTES = 75 << 10
"""Of shared memory, that a program takes at most: the next keys are on their way while it computes."""
MIN_PARTS = 8
"""Programs that share the keys of a row and KV head also where there are many rows: one of them may be much longer."""
MAX_PARTS = 64
"""As many fit a program of the second kernel."""


class SplitKVAttention:
    """The attention backend of a captured pass in which every token reads what it sees, wherever it is."""

    def __init__(self, programs: int) -> None:
        """Args: programs: that the device runs at once; rows are divided into as many, where there are fewer."""
        self._programs = programs

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Do nothing: no tensor is shared between layers."""
        yield

    def write(self, states: Tensor, storage: Tensor, batch: PackedBatch) -> None:
        """Write the new keys or values, (1, KV heads, tokens, size), to `storage`, (slots, KV heads, length, size)."""
        write_tokens(states, storage, batch)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: PackedBatch, spec: AttentionSpec, scale: float
    ) -> Tensor:
        """Attend each token of `query`, (tokens, heads, size), to its own slot of one layer's keys and values.

        Raises: ExecutorUnavailableError: the kernel does not compute these types or strides.
        """
        query = query if query.stride(2) == 1 else query.contiguous()
        _require_supported(query, keys, values)
        rows, heads, size = query.shape
        kv_heads, length, value_size = values.shape[1:]
        block_keys = _block_keys(size, value_size, keys.element_size())
        parts = self._parts(rows * kv_heads, math.ceil(length / block_keys))
        out = query.new_empty(rows, heads, value_size)
        # What each program finds, and the logarithm of the sum of its exponentials.
        found = out if parts == 1 else query.new_empty(rows, heads, parts, value_size, dtype=torch.float32)
        sums = query.new_empty(rows, heads, parts, dtype=torch.float32)
        positions, window = batch.positions[0], spec.sliding_window
        attend_part[rows, kv_heads, parts](
            *(query, keys, values, positions, batch.slots, found, sums, scale),
            *(*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
            WINDOW=window,
            SOFTCAP=spec.softcap,
            GROUP=heads // kv_heads,
            KEY_SIZE=size,
            VALUE_SIZE=value_size,
            GROUP_BLOCK=_group_block(heads // kv_heads, query.dtype),
            KEY_BLOCK=_block(size),
            VALUE_BLOCK=_block(value_size),
            BLOCK_KEYS=block_keys,
        )
        if parts > 1:
            combine_parts[rows, heads](
                *(found, sums, positions, out, parts),
                WINDOW=window,
                PARTS_BLOCK=_power_of_2(parts),
                VALUE_SIZE=value_size,
                VALUE_BLOCK=_block(value_size),
                BLOCK_KEYS=block_keys,
            )
        return out

    def _parts(self, rows: int, blocks: int) -> int:
        """Return among how many programs the keys of a row and KV head are divided."""
        return min(max(MIN_PARTS, self._programs // rows), MAX_PARTS, blocks)


def _require_supported(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raises: ExecutorUnavailableError."""
    types = {query.dtype, keys.dtype, values.dtype}
    if len(types) > 1 or not types <= DTYPES:
        raise ExecutorUnavailableError(f"the kernel does not compute {', '.join(sorted(map(str, types)))}")
    if any(each.stride(3) != 1 for each in (keys, values)):
        raise ExecutorUnavailableError("the kernel reads keys and values whose numbers lie one after the other")
    # Inside a slot it reckons with 32 bits.
    if any(each.stride(2) * each.shape[2] >= 1 << 31 for each in (keys, values)):
        raise ExecutorUnavailableError("the kernel does not reach the end of so long a slot")


def _power_of_2(number: int) -> int:
    """Return the least that is not less."""
    return 1 << (number - 1).bit_length()


def _block(size: int) -> int:
    return max(MIN_BLOCK, _power_of_2(size))


def _group_block(group: int, dtype: torch.dtype) -> int:
    # float32 goes without matrix instructions, and rows of zeros would be computed in full.
    return _power_of_2(group) if dtype == torch.float32 else _block(group)


def _block_keys(key_size: int, value_size: int, item_bytes: int) -> int:
    """Return how many keys a program reads at once: a power of two."""
    fitting = BLOCK_BYTES // (item_bytes * (_block(key_size) + _block(value_size)))
    return max(MIN_BLOCK, min(MAX_BLOCK_KEYS, 1 << (max(1, fitting).bit_length() - 1)))
