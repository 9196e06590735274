"""Attention of decoding on a GPU: the kernel that reads what each token sees, beside masked attention."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from app.worker.execution.graphs.attention_choice import faster_by_length, pass_seconds, split_kv_attention
from app.worker.execution.graphs.cuda_graphs import CudaGraphs
from app.worker.execution.graphs.decode_attention import DecodeAttention, masked_attention
from app.worker.execution.graphs.graph_executor import Record
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.packed_batch import Segment
from bench.model import Shape

KEYS = (256, 1500, 8000)
LENGTH = 8192
LAYERS = 4
"""Enough that the keys of a pass are not in the GPU's cache when they are read again."""


def measure_attention(
    note: Callable[..., None],
    attempt: Callable[[str], AbstractContextManager[None]],
    shape: Shape,
    device: str,
    sizes: Sequence[int],
) -> None:
    """Time a layer's attention for some rows, all with so many keys, and all but one with few; then choose as at load.

    Args:
        note: appends a result.
        attempt: notes an error and goes on.
        sizes: numbers of rows; the last one is that of the slots.
    """
    gpu = device == "cuda"
    keys, length = (KEYS, LENGTH) if gpu else ((20, 60), 64)
    cache = _cache(shape, sizes[-1], length, device, torch.bfloat16 if gpu else torch.float32)
    record: Record = CudaGraphs().record if gpu else lambda compute: compute
    # Of a processor only masked attention is measured, unless Triton's interpreter is there.
    kernel = split_kv_attention(cache.device) if gpu or importlib.util.find_spec("triton") is not None else None
    for rows in sizes:
        for name, ends in _lengths(rows, keys):
            with attempt(f"attention of {rows} rows, {name} keys"):
                masked = masked_attention(rows, _power_of_two(max(ends)), cache.slots)
                seconds = {"masked": pass_seconds(cache, ends, record, masked) / LAYERS}
                if kernel is not None:
                    seconds["kernel"] = pass_seconds(cache, ends, record, kernel) / LAYERS
                # What the tokens see, read once.
                seen = sum(ends) * cache.bytes_per_token / LAYERS
                note(
                    "attention",
                    rows=rows,
                    keys=name,
                    us={each: round(1e6 * time, 1) for each, time in seconds.items()},
                    gb_s={each: round(seen / time / 1e9, 1) for each, time in seconds.items()},
                )
    if kernel is not None:
        with attempt("the choice of attention"):
            note("choice", by_length=list(faster_by_length(cache, record)))


def _lengths(rows: int, keys: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Yield the keys that each row sees: the same number, or the most in one row and the fewest in the others."""
    for count in keys:
        yield f"{count}", [count] * rows
    if rows > 1:
        yield f"{keys[-1]} and {keys[0]}", [keys[-1], *[keys[0]] * (rows - 1)]


def _cache(shape: Shape, slots: int, length: int, device: str, dtype: torch.dtype) -> KVCache:
    """Return the KV cache of a few layers, which has been written."""
    cache = KVCache(slots, length, device, DecodeAttention(1, whole=False))
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    size = shape.head_dim
    query, state = (torch.zeros(1, each, 1, size, dtype=dtype, device=device) for each in (heads, kv_heads))
    for layer in range(LAYERS):
        cache.pack([Segment(0, 0, [0])], [1])
        cache.attend(query, *cache.update(state, state, layer), None, None, None)
    return cache


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
