"""Linear layers whose weights lie in the order in which oneDNN reads them.

On a CPU an ordinary layer brings its weights into that order anew in every call, which for the few tokens of a decoding
step costs as much as the product itself.  The operators are torch's own but private (they are what freezing compiles
to), so that they are used from here only, tried out before, and done without where they fail.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
USUAL_ROWS = 8
"""The number of tokens that the order is chosen for; others are served as well."""
LEAST_WEIGHTS = 500_000
"""Smaller layers lose more by the call than they gain: with 330,000 weights an ordinary one is as fast or faster."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a packed layer's numbers may be from an ordinary one's, as a share of their norm."""


class PackedLinear(nn.Module):
    """Computes what the given layer computes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        done: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return done


@torch.inference_mode()
def pack_linears(model: Any, least: int = LEAST_WEIGHTS) -> int:
    """Replace a model's linear layers that have at least so many weights; for inference only.

    Returns: how many were replaced, 0 where this processor or torch cannot.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype in DTYPES
        if child.weight.numel() >= least
    ]
    try:
        for linear in {child.weight.shape: child for _, _, child in found}.values():
            _try_out(linear)
    except Exception as error:  # noqa: BLE001  # private operators may fail in any way; the plain path is there
        log.warning("weights are not packed: %s", type(error).__name__)
        return 0
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child))
    return len(found)


def _try_out(linear: nn.Linear) -> None:
    """Raises: ArithmeticError, or whatever torch raises: this layer's shape is not computed rightly."""
    x = torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    expected = functional.linear(x, linear.weight, linear.bias)
    error = (PackedLinear(linear)(x) - expected).float().norm()
    if not error <= TOLERANCE[linear.weight.dtype] * expected.float().norm():
        raise ArithmeticError("a packed layer computes something else")
