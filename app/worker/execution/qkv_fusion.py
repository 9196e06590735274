"""Linear layers that read the same input as one product: fewer calls in a step, and none too small for all threads.

Knows nothing of how layers are packed.  Works by the names that transformers gives to such layers; a model with other
names keeps its layers as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Fused:
    """One product for several layers: computed when the first of them is called with an input, kept for the others."""

    def __init__(self, product: nn.Module, sizes: list[int]) -> None:
        """Args: sizes: outputs of each layer."""
        self.product = product
        self._sizes = sizes
        self._input: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def part(self, index: int, x: Tensor) -> Tensor:
        """Return what the layer of this number makes of `x`."""
        if self._input is not x or index not in self._parts:
            self._input = x
            self._parts = dict(enumerate(self.product(x).split(self._sizes, dim=-1)))
        found = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return found


class Part(nn.Module):
    """Stands where one of the layers stood."""

    def __init__(self, fused: Fused, index: int) -> None:
        super().__init__()
        self.fused = fused
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        return self.fused.part(self._index, x)


@torch.inference_mode()
def fuse_linears(model: Any, pack: Callable[[nn.Linear], nn.Module | None]) -> int:
    """Replace groups of layers.

    Args: pack: makes the layer that computes a whole group; None leaves the group as it is.
    Returns: how many layers were replaced.
    """
    count = 0
    for parent, names in list(_groups(model)):
        layers = [getattr(parent, name) for name in names]
        product = pack(_joined(layers))
        if product is not None:
            fused = Fused(product, [layer.out_features for layer in layers])
            for index, name in enumerate(names):
                setattr(parent, name, Part(fused, index))
            count += len(names)
    return count


def _groups(model: Any) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    for parent in model.modules():
        for names in SIBLINGS:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            plain = [layer for layer in layers if type(layer) is nn.Linear and layer.weight.device.type == "cpu"]
            kinds = {(layer.in_features, layer.weight.dtype, type(layer.bias)) for layer in plain}
            if len(plain) == len(names) and len(kinds) == 1:
                yield parent, names


def _joined(layers: list[nn.Linear]) -> nn.Linear:
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    biases: list[Any] = [layer.bias for layer in layers]
    bias: Any = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
    joined.bias = bias
    return joined
