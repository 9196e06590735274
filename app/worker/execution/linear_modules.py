"""Find the linear layers of a model, of whichever kind, so that others can take their places."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Find the linear layers on the CPU: whose they are, their name there, and they themselves.

    Each may be replaced before the next is asked for, and is held no longer: at no time are there two whole models.
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


def _as_linear(layer: Conv1D) -> nn.Linear:
    """Return GPT-2's kind of linear layer, whose weights are (inputs, outputs), as the ordinary kind."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.T, requires_grad=False), layer.bias
    return linear
