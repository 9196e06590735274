"""Whether the weights of a model fit into the memory that is free, found out before any of it is taken."""

import math
from pathlib import Path

import torch
from safetensors import safe_open

from app.worker.loading.kv_memory import free_bytes
from app.worker.loading.model_files import NoMemoryError, weight_files
from app.worker.loading.quantized_checkpoints import BITSANDBYTES

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Formats that are converted to the type in which the model computes, and their bytes."""
SMALL_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Others, if they have more than one byte; those of packed numbers are kept as they are."""


def check_memory(folder: Path, dtype: torch.dtype | str, device: str, quantization: str = "none") -> None:
    """Compare the weights as they will be in memory with what is free.

    Args:
        dtype: the type to compute in; "auto" is that of the files.
        quantization: `model.quantization`; what bitsandbytes leaves as it is does not count.
    Raises: NoMemoryError: they do not fit.
    """
    needed, free = weights_bytes(folder, dtype) * BITSANDBYTES.get(quantization, 16) // 16, free_bytes(device)
    if needed > free:
        raise NoMemoryError(needed_bytes=needed, free_bytes=free, device=device)


def weights_bytes(folder: Path, dtype: torch.dtype | str) -> int:
    """Return the bytes that the weights take in memory."""
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
