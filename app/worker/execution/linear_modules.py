"""Find the linear layers of a model, and replace them by modules that compute the same."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a replacement's output may be from the ordinary layer's, as a share of its norm."""


def linear_modules(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Find the linear layers on the CPU: their parent, their name there, and they themselves.

    Each may be replaced before the next is requested, and is referenced no longer: at no time are there two whole
    models in memory.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in {nn.Linear, Conv1D} and child.weight.device.type == "cpu"
    ]
    for parent, name in places:
        child: Any = getattr(parent, name)
        yield parent, name, child if isinstance(child, nn.Linear) else _as_linear(child)


@torch.inference_mode()
def replace_linears(model: Any, build: Callable[[nn.Linear], nn.Module], *, min_weights: int) -> int:
    """Replace a model's linear layers where `build` succeeds and its module computes the same; for inference only.

    Args:
        build: returns the replacement of a layer, or raises anything.
        min_weights: layers with fewer weights stay as they are.
    Returns: how many were replaced.
    """
    rejected: set[torch.Size] = set()
    count = 0
    for parent, name, linear in linear_modules(model):
        shape = linear.weight.shape
        if linear.weight.dtype not in TOLERANCE or linear.weight.numel() < min_weights or shape in rejected:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                setattr(parent, name, _verified(build(linear), linear))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # optional operators may fail in any way; the plain layer stays
            rejected.add(shape)
            log.info("layers of shape %s are not replaced: %s: %s", tuple(shape), type(error).__name__, error)
        else:
            count += 1
    return count


def _verified(module: nn.Module, linear: nn.Linear) -> nn.Module:
    """Raises: ArithmeticError: the module computes something else than the layer."""
    x = torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    expected = functional.linear(x, linear.weight, linear.bias)
    error = (module(x) - expected).float().norm()
    if not error <= TOLERANCE[linear.weight.dtype] * expected.float().norm():
        raise ArithmeticError("the replacement computes something else")
    return module


def _as_linear(layer: Conv1D) -> nn.Linear:
    """Return GPT-2's kind of linear layer, whose weights are (inputs, outputs), as the ordinary kind."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T, requires_grad=False), layer.bias
    return linear


class LinearShape(NamedTuple):
    """The size of a linear layer."""

    inputs: int
    outputs: int


def linear_shapes(model: Any) -> dict[str, LinearShape]:
    """Return the linear layers that compute every token, by their paths, before any of them is replaced.

    Without the output projection, which computes only the tokens whose logits are wanted, and without experts.
    """
    shapes: dict[str, LinearShape] = {}
    for path, module in model.named_modules():
        if module is model.get_output_embeddings() or "experts" in path.split("."):
            continue
        if isinstance(module, nn.Linear):
            shapes[path] = LinearShape(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[path] = LinearShape(module.nx, module.nf)
    return shapes
