"""Linear layers in 8-bit integer arithmetic, through torch's own operators.

Weights have a scale for each output, activations one for each token (dynamic quantization by token, as in Dettmers and
others 2022 without their outlier columns), so that a token's output does not depend on what else is in the batch.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution import private_api
from app.worker.execution.quantization import QuantizationError

TOLERANCE = 0.01
"""How far a layer's output may be from the same rounded weights and activations in floats, as a share of its norm; a
value between two steps may be rounded either way."""
TINY = torch.finfo(torch.float32).tiny


class Int8Linear(nn.Module):
    """Multiplies 8-bit integers and adds them up exactly (FBGEMM or oneDNN)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self._weights = private_api.Int8Weights(weight, weight.abs().amax(1).clamp(min=TINY) / 127)
        self._bias = linear.bias
        # Without VNNI pairs of products are added in 16 bits, for which activations of 8 bits would be too much.
        self._steps = 127 if private_api.cpu_has_vnni() else 63

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        scaled, peaks = _normalized(x)
        out = self._weights.multiply(scaled, 1 / self._steps, self._steps + 1)
        out *= peaks
        return self._with_bias(out, x)

    def with_exact_inputs(self, x: Tensor) -> Tensor:
        """Multiply the same rounded weights with activations that are not rounded, in float32."""
        return self._with_bias(functional.linear(x.float(), self._weights.dequantized()), x)

    def in_floats(self, x: Tensor) -> Tensor:
        """Compute the same without integers, slowly."""
        scaled, peaks = _normalized(x)
        rounded = (scaled * self._steps).round() / self._steps * peaks
        return self._with_bias(functional.linear(rounded, self._weights.dequantized()), x)

    def _with_bias(self, out: Tensor, x: Tensor) -> Tensor:
        if self._bias is not None:
            out += self._bias
        return out.to(x.dtype)


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` in float32 with each token's values between -1 and 1, and what it was divided by."""
    exact = x.float()
    peaks = exact.abs().amax(-1, keepdim=True).clamp_(min=TINY)
    return exact / peaks, peaks


def int8_linear(linear: nn.Linear) -> Int8Linear:
    """Return a verified replacement of a linear layer.

    Raises: QuantizationError: this processor has no such operator, or it computes something else.
    """
    x = torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    try:
        with warnings.catch_warnings(action="ignore"):
            layer = Int8Linear(linear)
            expected = layer.in_floats(x).float()
            difference = (layer(x).float() - expected).norm()
    except (RuntimeError, AttributeError) as error:
        raise QuantizationError("this processor has no arithmetic for it") from error
    if not difference <= TOLERANCE * expected.norm():
        raise QuantizationError("this processor computes something else")
    return layer


def has_integer_linears(model: Any) -> bool:
    """Return whether a model computes in integers, where a last-bit difference can become 1 %."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


@contextmanager
def float_linears(model: Any) -> Iterator[None]:
    """Let a model's integer layers compute in floats, so that no last-bit difference becomes 1 %."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    try:
        for layer in layers:
            vars(layer)["forward"] = layer.with_exact_inputs
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
