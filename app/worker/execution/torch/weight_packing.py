"""Linear layers whose weights lie in the order in which a CPU's matrix product reads them.

An ordinary layer brings its weights into that order anew in every call, which for the few tokens of a decoding step
costs as much as the product itself; and a step for few rows takes as long as it takes to read the weights.  So weights
are ordered once, and in float32 models kept in 16 bits where that loses nothing: by a program of our own (`panels.py`),
and without a compiler by operators of torch that are private or going out of use.  Each is used from here only, tried
out before, and done without where it fails.
"""

import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution.linear_modules import linears
from app.worker.execution.native.packed_linear import NativeLinear, fits_float16
from app.worker.execution.qkv_fusion import fuse_linears

log = logging.getLogger(__name__)

USUAL_ROWS = 8
"""The number of tokens that oneDNN's order is chosen for; others are served as well."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a packed layer's numbers may be from an ordinary one's, as a share of their norm."""


class HalfLinear(nn.Module):
    """Keeps its weights as float16 and computes in float32 (FBGEMM, x86 only): half as much to read in each step.

    Weights of a checkpoint in bfloat16 or float16 fit without loss; those that need more bits are refused.
    """

    MIN_WEIGHTS = 250_000
    """Smaller layers lose more by waking the other threads than they gain."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises: ArithmeticError: the weights need more than 16 bits."""
        super().__init__()
        weight = linear.weight.detach()
        if not fits_float16(weight):
            raise ArithmeticError("float16 does not hold these weights")
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        done: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return done


class PackedLinear(nn.Module):
    """Keeps its weights in oneDNN's own order."""

    MIN_WEIGHTS = 500_000
    """With 330,000 weights an ordinary layer is as fast or faster."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), USUAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        done: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")
        return done


Way = type[NativeLinear] | type[HalfLinear] | type[PackedLinear]
OF_TORCH: tuple[Way, ...] = (HalfLinear, PackedLinear)
"""Those that need no compiler."""
WAYS: dict[torch.dtype, tuple[Way, ...]] = {
    torch.float32: (NativeLinear, *OF_TORCH),
    torch.bfloat16: (NativeLinear, PackedLinear),
}
"""Better ones first."""


@torch.inference_mode()
def pack_linears(model: Any, ways: Collection[Way] | None = None, *, least: int | None = None) -> int:
    """Replace a model's linear layers, as far as that makes them faster; for inference only.

    Args:
        ways: to be used at most; None is all that there are.
        least: layers with so many weights are large enough; None leaves that to each way.
    Returns: how many were replaced, 0 where this processor or torch cannot.
    """
    refused: set[object] = set()

    def pack(linear: nn.Linear) -> nn.Module | None:
        usable = [way for way in WAYS.get(linear.weight.dtype, ()) if ways is None or way in ways]
        return _pack(linear, usable, least, refused)

    count = fuse_linears(model, pack)
    for parent, name, linear in linears(model):
        packed = pack(linear)
        if packed is not None:
            setattr(parent, name, packed)
            count += 1
    return count


def _pack(linear: nn.Linear, ways: Sequence[Way], least: int | None, refused: set[object]) -> nn.Module | None:
    """Return the layer packed, or None; what failed once for a shape is not tried for it again."""
    for way in ways:
        shape = way, linear.weight.shape
        if shape in refused or linear.weight.numel() < (way.MIN_WEIGHTS if least is None else least):
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
