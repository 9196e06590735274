"""Linear layers whose weights are stored in the order in which a CPU's matrix product reads them.

An ordinary layer reorders its weights in every call, which for the few tokens of a decoding step costs as much as the
product itself; and a step for few tokens takes as long as it takes to read the weights.  So weights are packed once,
and as float16 in float32 models where that loses nothing, which halves what a step reads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from app.worker.execution import private_api
from app.worker.execution.linear_modules import replace_linears
from app.worker.execution.quantization import fits_float16

MIN_FLOAT16_WEIGHTS = 100_000
"""Smaller layers lose more by waking the other threads than they gain; key and value projections are often larger."""
MIN_ONEDNN_WEIGHTS = 500_000
"""With 330,000 weights an ordinary layer is as fast or faster."""


class PrepackedLinear(nn.Module):
    """A linear layer that computes with packed weights."""

    def __init__(self, kernel: private_api.LinearKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        return self.kernel(x)


def prepack_linears(model: Any, *, min_weights: int | None = None) -> int:
    """Pack a model's large linear layers, as far as this processor and this torch can.

    Args: min_weights: replaces the thresholds of both formats; None uses them.
    Returns: how many were packed.
    """
    float16, onednn = (
        default if min_weights is None else min_weights for default in (MIN_FLOAT16_WEIGHTS, MIN_ONEDNN_WEIGHTS)
    )
    return replace_linears(model, float16_linear, min_weights=float16) + replace_linears(
        model, onednn_linear, min_weights=onednn
    )


def float16_linear(linear: nn.Linear) -> PrepackedLinear:
    """Store float32 weights as float16 (FBGEMM, x86 only).

    Weights of a checkpoint in bfloat16 or float16 fit without loss.
    Raises: ArithmeticError: the layer computes in another type, or its weights need more than 16 bits.
    """
    weight = linear.weight.detach()
    if weight.dtype != torch.float32 or not fits_float16(weight):
        raise ArithmeticError("float16 does not represent these weights")
    return PrepackedLinear(private_api.fbgemm_float16_linear(weight, linear.bias))


def onednn_linear(linear: nn.Linear) -> PrepackedLinear:
    """Store float32 or bfloat16 weights in oneDNN's layout."""
    return PrepackedLinear(private_api.onednn_linear(linear.weight.detach(), linear.bias))
