"""Whether a model fits into the memory that is free, found out before any of it is taken."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from app.worker.loading.kv_memory import SHARE, free_bytes
from app.worker.loading.model_files import NoMemoryError, gguf_file, weight_files
from app.worker.loading.quantized_checkpoints import BITSANDBYTES, gguf_numbers

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Formats that are converted to the type in which the model computes, and their bytes."""
SMALL_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Others, if they have more than one byte; those of packed numbers are kept as they are."""
MARGIN = 0.05
"""Of the weights, for what a forward pass needs beside them."""
SLOT_TOKENS = 2048
"""Tokens that the KV cache has room for in any case, if the context window does: without them nothing is served."""


def check_memory(
    folder: Path,
    dtype: torch.dtype | str,
    device: str,
    quantization: str = "none",
    *,
    config: Any = None,
    context_length: int = 0,
    copies: int = 1,
) -> int:
    """Compare what a model takes at least with what is free: its weights, one slot of its KV cache, and a margin.

    Args:
        dtype: the type to compute in; "auto" is that of the files.
        quantization: `model.quantization`; what bitsandbytes leaves as it is does not count.
        config: of a model that generates.
        context_length: its tokens at most.
        copies: forms of its weights that may be in memory at once.
    Returns: how many of these fit.
    Raises: NoMemoryError: not even one does.
    """
    weights, free = weights_bytes(folder, dtype) * BITSANDBYTES.get(quantization, 16) // 16, free_bytes(device)
    cache = kv_bytes_per_token(config, dtype) * min(context_length, SLOT_TOKENS)
    # The KV cache may have a share of what the weights leave.
    needed = int(weights * (1 + MARGIN) + cache / SHARE[device])
    if needed > free:
        raise NoMemoryError(needed_bytes=needed, free_bytes=free, weights_bytes=weights, device=device)
    return min(copies, 1 + (free - needed) // max(1, weights))


def kv_bytes_per_token(config: Any, dtype: torch.dtype | str) -> int:
    """Return the bytes of a token's keys and values in all layers; 0 if a configuration does not say how many."""
    text = None if config is None else config.get_text_config(decoder=True)
    heads = _whole(text, "num_attention_heads")
    layers, kv_heads = _whole(text, "num_hidden_layers"), _whole(text, "num_key_value_heads") or heads
    size = _whole(text, "head_dim") or _whole(text, "hidden_size") // max(heads, 1)
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(text, "dtype", None)
    return 2 * layers * kv_heads * size * (kind.itemsize if isinstance(kind, torch.dtype) else 2)


def _whole(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def weights_bytes(folder: Path, dtype: torch.dtype | str) -> int:
    """Return the bytes that the weights take in memory."""
    if (packed := gguf_file(folder)) is not None:
        # transformers computes with it as with ordinary weights.
        return gguf_numbers(packed) * (dtype.itemsize if isinstance(dtype, torch.dtype) else FLOATS["F32"])
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                tensor = tensors.get_slice(name)
                total += math.prod(tensor.get_shape()) * _size(tensor.get_dtype(), dtype)
    return total


def _size(stored: str, dtype: torch.dtype | str) -> int:
    if stored in FLOATS and isinstance(dtype, torch.dtype):
        return dtype.itemsize
    return FLOATS.get(stored) or SMALL_BYTES.get(stored, 1)
