"""Choose the attention of recorded passes on this machine: masked, or a kernel that reads what each token sees."""

import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.worker.execution.base import AttentionSpec, ExecutorUnavailableError
from app.worker.execution.graphs.decode_attention import DecodeAttention, PassAttention, masked_attention
from app.worker.execution.graphs.graph_executor import Record, powers_of_two
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.packed_batch import Segment, StaticBatch

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far what a head finds may be from masked attention, as a share of its norm; another row's is farther than 1.

torch may multiply float32 with 10 bits on a GPU.
"""
TRIAL_ROWS = 8
TIMED_KEYS = (256, 2048, 8192)
"""The lengths of slots in passes that are timed: the rows of a pass have between half as many keys and all of them."""
ROUNDS = 5
"""How often a pass is timed; the least counts, since whatever else goes on only adds to it."""


def faster_by_length(
    cache: KVCache, record: Record, attention: PassAttention | None = None
) -> Mapping[int, PassAttention]:
    """Return attention by the lengths of sequences for the numbers of rows for which it is faster than masked.

    Overwrites the KV cache, which has been written by a forward pass of the model.

    Args:
        attention: what is tried; without it, our Triton kernel.
    Raises:
        ImportError: there is no Triton.
        ExecutorUnavailableError: it does not compute the same, or not these types.
        Whatever compiling it, or `record`, raises.
    """
    by_length = attention or split_kv_attention(cache.device)
    try:
        for layer in {spec: layer for layer, spec in cache.specs.items()}.values():
            _verify(cache, layer, record, by_length)
    finally:
        for slot in range(cache.slots):
            cache.clear_slot(slot)
    faster, lines = dict[int, PassAttention](), list[str]()
    for rows in powers_of_two(1, cache.slots):
        found, masked = (_seconds(cache, rows, record, each) for each in (by_length, None))
        if found < masked:
            faster[rows] = by_length
        lines.append(f"{rows} rows {1000 * found:.2f} ms, masked {1000 * masked:.2f}")
    log.info("attention by lengths is used for %d of %d sizes of passes: %s", len(faster), len(lines), "; ".join(lines))
    return faster


def split_kv_attention(device: torch.device) -> PassAttention:
    """Return our Triton kernel.  Raises: ImportError: there is no Triton."""
    # It comes with torch's CUDA wheels, and nowhere else.
    from app.worker.execution.graphs.split_kv_attention import SHARED_BYTES, SplitKVAttention

    if device.type != "cuda":
        return SplitKVAttention(1)
    gpu = torch.cuda.get_device_properties(device)
    return SplitKVAttention(gpu.multi_processor_count * max(1, gpu.shared_memory_per_multiprocessor // SHARED_BYTES))


@torch.inference_mode()
def _verify(cache: KVCache, layer: int, record: Record, attention: PassAttention) -> None:
    """Compare with masked attention over one layer of random numbers, for sequences from one token to a whole slot.

    Raises: ExecutorUnavailableError: a head differs.
    """
    spec, (keys, values) = cache.specs[layer], cache.layer(layer)
    generator = torch.Generator(cache.device).manual_seed(0)
    for storage in (keys, values):
        storage.normal_(generator=generator)
    rows = min(TRIAL_ROWS, cache.slots)
    # The last row is padding, a copy of the one before it.
    lengths = _spread(1, cache.length, max(1, rows - 1))
    slots = _spread(0, cache.slots - 1, len(lengths))
    batch = StaticBatch(rows, cache.device)
    batch.load([Segment(slot, length - 1, [0]) for slot, length in zip(slots, lengths, strict=True)])
    query, scale = _query(spec, rows, cache.device), spec.key_size**-0.5
    found = query.new_empty(rows, spec.query_heads, spec.value_size)

    def compute() -> None:
        found.copy_(attention.attend(query, keys, values, batch, spec, scale))

    record(compute)()
    expected = DecodeAttention(cache.length, whole=False).attend(query, keys, values, batch, spec, scale)
    error = (found.float() - expected.float()).norm(dim=2) / expected.float().norm(dim=2)
    if not float(error.max()) <= TOLERANCE.get(query.dtype, 0):
        raise ExecutorUnavailableError(f"a head's attention differs by {float(error.max()):.2%}")


def _seconds(cache: KVCache, rows: int, record: Record, attention: PassAttention | None) -> float:
    """Return how long passes of so many rows attend, one of each length; infinity where there is no memory for them.

    Args: attention: None is masked attention.
    """
    try:
        return sum(
            pass_seconds(
                cache,
                _spread(max(1, keys // 2), keys, rows),
                record,
                attention or masked_attention(rows, keys, cache.slots),
            )
            for keys in sorted({min(keys, cache.length) for keys in TIMED_KEYS})
        )
    except torch.OutOfMemoryError:
        return math.inf


@torch.inference_mode()
def pass_seconds(cache: KVCache, keys: Sequence[int], record: Record, attention: PassAttention) -> float:
    """Return how long the attention of all layers takes: in one alone, the device's cache would hold the keys.

    Args: keys: that the token in each of the first slots sees, if no window hides some.
    """
    rows = len(keys)
    batch = StaticBatch(rows, cache.device)
    batch.load([Segment(slot, end - 1, [0]) for slot, end in enumerate(keys)])
    queries = {spec: _query(spec, rows, cache.device) for spec in set(cache.specs.values())}

    def compute() -> None:
        with attention.one_pass():
            for layer, spec in cache.specs.items():
                attention.attend(queries[spec], *cache.layer(layer), batch, spec, spec.key_size**-0.5)

    recorded, best = record(compute), math.inf
    for _ in range(ROUNDS):
        _synchronize(cache.device)
        began = time.perf_counter()
        recorded()
        _synchronize(cache.device)
        best = min(best, time.perf_counter() - began)
    return best


def _query(spec: AttentionSpec, rows: int, device: torch.device) -> Tensor:
    """Return random queries, (rows, heads, size).  Raises: ExecutorUnavailableError: keys are of another type."""
    dtype, *others = spec.dtypes
    if others:
        raise ExecutorUnavailableError("queries, keys and values are of several types")
    return torch.randn(rows, spec.query_heads, spec.key_size, device=device).to(dtype)


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return integers from `last` down to `first`, as far from each other as can be; `last` alone if one is wanted."""
    return [last - (last - first) * index // max(1, count - 1) for index in range(count)]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
