"""The weights of a LoRA adapter as the native decoder reads them (lora.h)."""

import ctypes
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from app.worker.execution.lora import LoraAdapter
from app.worker.execution.native.attention import LANES
from app.worker.execution.native.packed_linear import gemm_kernels

LINEARS = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
"""The linear layers of a decoder layer, by the fields of `LoraLayer`."""
LORA_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of weights, and the numbers of `LoraType`."""
CACHE_LINE = 64
"""Bytes; where each half of a layer's weights begins."""
_ONE_INPUT = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linear layers that read the same input, in the order in which a step computes them."""


class LoraWeightsStruct(ctypes.Structure):
    """Mirrors `LoraWeights`."""

    _fields_ = [
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class LoraLayerStruct(ctypes.Structure):
    """Mirrors `LoraLayer`."""

    _fields_ = [(name, LoraWeightsStruct) for name in LINEARS]


class AdapterWeights:
    """A copy of an adapter's weights, which lie in the order in which a step reads them."""

    def __init__(self, adapter: LoraAdapter, num_layers: int) -> None:
        """Args: num_layers: of the decoder."""
        self.rank = adapter.rank + adapter.rank % 2
        """The highest rank of its layers, or one more."""
        self._layers = (LoraLayerStruct * num_layers)()
        halves = [half for index in range(num_layers) for half in self._halves(adapter, index)]
        self._buffer = torch.cat([content for *_, content in halves])
        ends = accumulate(len(content) for *_, content in halves)
        for (weights, name, content), end in zip(halves, ends, strict=True):
            setattr(weights, name, self._buffer.data_ptr() + end - len(content))

    @property
    def address(self) -> int:
        """Return where the decoder layers are, for as long as this object lives."""
        return ctypes.addressof(self._layers)

    def _halves(self, adapter: LoraAdapter, index: int) -> Iterator[tuple[LoraWeightsStruct, str, Tensor]]:
        """Yield both halves of all products of a decoder layer: whose they are, which half, and their bytes."""
        for names in _ONE_INPUT:
            ups: list[tuple[LoraWeightsStruct, str, Tensor]] = []
            for name in names:
                weights = adapter.layers.get(f"model.layers.{index}.{LINEARS[name]}")
                if weights is None:
                    continue
                down, up = (_readable(half) for half in (weights.down, weights.up))
                target: LoraWeightsStruct = getattr(self._layers[index], name)
                target.rank, target.type, target.scale = len(down), LORA_TYPES[down.dtype], weights.scale
                yield target, "down", _bytes_of(down)
                ups.append((target, "up", _bytes_of(_packed(up))))
            yield from ups


def _readable(half: Tensor) -> Tensor:
    """Return weights in a type that the kernels read: float16 only where the processor converts it.

    In bfloat16 the ranks are multiplied in pairs; the last one may be zeros.
    """
    if half.dtype == torch.bfloat16:
        return functional.pad(half, (0, 0, 0, len(half) % 2))
    return half.float() if half.dtype == torch.float16 and not gemm_kernels().has_float16 else half


def _packed(up: Tensor) -> Tensor:
    """Reorder (rank, outputs) to (outputs / LANES, rank, LANES), in bfloat16 with two ranks side by side."""
    pair = 2 if up.dtype == torch.bfloat16 else 1
    return up.view(len(up) // pair, pair, -1, LANES).permute(2, 0, 3, 1)


def _bytes_of(half: Tensor) -> Tensor:
    content = half.contiguous().flatten().view(torch.uint8)
    return functional.pad(content, (0, -len(content) % CACHE_LINE))
