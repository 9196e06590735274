"""Copies between KV cache slots and the prefix cache in one call of a native kernel library (kv_blocks.cpp)."""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from app.worker.execution.native.native_build import build_kernel_library


class _BlockTensor(ctypes.Structure):
    """Mirrors `BlockTensor`."""

    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("token_bytes", ctypes.c_int64),
    ]


class NativeBlockCopier:
    """Copies the keys and values of all layers of a KV cache on the host."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Args:
        tensors: of each layer the slots' keys, (slots, KV heads, length, size), and the blocks', (blocks, KV heads,
            tokens of a block, size), and the same of its values; all contiguous.

        Raises: CompileError: the library cannot be built.
        """
        self._copy = block_copy_library().llmk_copy_blocks
        self._copy.restype = None
        self._referenced = tensors
        """The library holds pointers to their memory."""
        self._table = (_BlockTensor * len(tensors))(
            *(
                _BlockTensor(slots.data_ptr(), blocks.data_ptr(), slots.shape[1], slots.shape[3] * slots.itemsize)
                for slots, blocks in tensors
            )
        )
        (self._slots, _, self._length, _), (self._blocks, _, self._tokens, _) = (each.shape for each in tensors[0])

    def save(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Copy a slot, from the token `start` on, to blocks.

        Raises: IndexError: there is no such slot, token or block.
        """
        self._call(slot, start, blocks, restore=False)

    def restore(self, blocks: Sequence[int], slot: int) -> None:
        """Copy blocks to the beginning of a slot.

        Raises: IndexError: there is no such slot or block.
        """
        self._call(slot, 0, blocks, restore=True)

    def _call(self, slot: int, start: int, blocks: Sequence[int], *, restore: bool) -> None:
        # The library checks no address that it writes to.
        if not (0 <= slot < self._slots and 0 <= start <= self._length):
            raise IndexError("a copy lies outside of the KV cache slots")
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._blocks:
            raise IndexError("a copy lies outside of the prefix cache")
        number = ctypes.c_int64
        self._copy(
            self._table,
            number(len(self._table)),
            number(self._length),
            number(self._tokens),
            number(slot),
            number(start),
            (number * len(blocks))(*blocks),
            number(len(blocks)),
            restore,
            torch.get_num_threads(),
        )


@cache
def block_copy_library() -> ctypes.CDLL:
    """Return the library, built once for all models.

    Raises: CompileError: there is no compiler, or it fails.
    """
    return build_kernel_library("kv_blocks", structures={"block_tensor": _BlockTensor})
