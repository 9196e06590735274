"""Linear layers whose weights lie in the order in which a CPU's matrix product reads them.

An ordinary layer brings its weights into that order anew in every call, which for the few tokens of a decoding step
costs as much as the product itself; and a step for few rows takes as long as it takes to read the weights.  So weights
are ordered once, and in float32 models kept in 16 bits where that loses nothing.  The operators are torch's own but
private or going out of use, so that they are used from here only, tried out before, and done without where they fail.
"""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.engine.worker.fusing import fuse_linears
from app.engine.worker.linears import linears

log = logging.getLogger(__name__)

USUAL_ROWS = 8
"""The number of tokens that oneDNN's order is chosen for; others are served as well."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a packed layer's numbers may be from an ordinary one's, as a share of their norm."""
LOSSLESS = 1e-7
"""What keeping weights in another type may change, as a share of their norm: as much as one rounding in float32."""


class HalfLinear(nn.Module):
    """Keeps its weights as float16 and computes in float32 (FBGEMM, x86 only): half as much to read in each step.

    Weights of a checkpoint in bfloat16 or float16 fit without loss; those that need more bits are refused.
    """

    LEAST = 250_000
    """Smaller layers lose more by waking the other threads than they gain."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises: ArithmeticError: the weights need more than 16 bits."""
        super().__init__()
        weight = linear.weight.detach()
        lost = (weight.half().float() - weight).norm()
        if not lost <= LOSSLESS * weight.norm():
            raise ArithmeticError("float16 does not hold these weights")
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        done: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return done


class PackedLinear(nn.Module):
    """Keeps its weights in oneDNN's own order."""

    LEAST = 500_000
    """With 330,000 weights an ordinary layer is as fast or faster."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        done: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return done


WAYS: dict[torch.dtype, tuple[type[HalfLinear] | type[PackedLinear], ...]] = {
    torch.float32: (HalfLinear, PackedLinear),
    torch.bfloat16: (PackedLinear,),
}
"""Better ones first."""


@torch.inference_mode()
def pack_linears(model: Any, least: int | None = None) -> int:
    """Replace a model's linear layers, as far as that makes them faster; for inference only.

    Args: least: layers with so many weights are large enough; None leaves that to each way.
    Returns: how many were replaced, 0 where this processor or torch cannot.
    """
    refused: set[object] = set()
    count = fuse_linears(model, lambda linear: _pack(linear, least, refused))
    for parent, name, linear in linears(model):
        packed = _pack(linear, least, refused)
        if packed is not None:
            setattr(parent, name, packed)
            count += 1
    return count


def _pack(linear: nn.Linear, least: int | None, refused: set[object]) -> nn.Module | None:
    """Return the layer packed, or None; what failed once for a shape is not tried for it again."""
    for way in WAYS.get(linear.weight.dtype, ()):
        shape = way, linear.weight.shape
        if shape in refused or linear.weight.numel() < (way.LEAST if least is None else least):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                return _tried(way(linear), linear)
        except Exception as error:  # noqa: BLE001  # such operators may fail in any way; the plain path is there
            refused.add(shape)
            log.info(
                "%s does not serve %s: %s", way.__name__, tuple(linear.weight.shape), str(error) or type(error).__name__
            )
    return None


def _tried(packed: nn.Module, linear: nn.Linear) -> nn.Module:
    """Raises: ArithmeticError, or whatever torch raises: the layer is not computed rightly."""
    x = torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    expected = functional.linear(x, linear.weight, linear.bias)
    error = (packed(x) - expected).float().norm()
    if not error <= TOLERANCE[linear.weight.dtype] * expected.float().norm():
        raise ArithmeticError("a packed layer computes something else")
    return packed
