"""Linear layers with weights of 8 bits on a CPU: smaller and faster, and no longer exactly the model's own numbers.

Weights have a scale for each output.  Where a program of our own computes them (`panels.py`), that is all; torch's own
operators compute with integers throughout, and activations are rounded as well, with a scale for each token (dynamic
quantization by token, as in Dettmers and others 2022 without their outlier columns), so that a token's numbers do not
depend on what else is in the batch.  What either does to log-probabilities is measured when a model is loaded.  Torch's
operator is private, so that it is used from here only and tried out before.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution.linear_modules import linears
from app.worker.execution.native.packed_linear import quantize_int8

TOLERANCE = 0.01
"""How far a layer's numbers may be from those of the same rounded weights and activations in floats, as a share of
their norm; a value that lies between two steps may be rounded either way."""
TEXT = (
    "The harbour was quiet when the ferry came in. Two boys carried a crate of oranges along the pier, and a woman in "
    "a green coat asked them what the price was. It had rained in the night; the stones were still dark, and from the "
    "café on the corner came the smell of bread. In 1987, she said, a crate had cost three coins, and nobody counted."
)
"""What the effect is measured on, in the model's own tokens."""
PROBE_TOKENS = 256
"""At most so many of them."""


class QuantizationError(Exception):
    """This processor has no such operator, or it computes something else."""


class Int8Linear(nn.Module):
    """Multiplies integers of 8 bits and adds them up exactly (FBGEMM or oneDNN)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        whole = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        self._packed: Any = torch.ops.quantized.linear_prepack(whole, None)
        self._bias = linear.bias
        # Without VNNI pairs of products are added in 16 bits, for which activations of 8 bits would be too much.
        self._steps = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        scaled, peaks = _scaled(x)
        done: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            scaled, 1 / self._steps, self._steps + 1, self._packed
        )
        done *= peaks
        return self._finished(done, x)

    def in_floats(self, x: Tensor) -> Tensor:
        """Compute the same without integers, slowly."""
        scaled, peaks = _scaled(x)
        rounded = (scaled * self._steps).round() / self._steps * peaks
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        return self._finished(functional.linear(rounded, weight.dequantize()), x)

    def _finished(self, done: Tensor, x: Tensor) -> Tensor:
        if self._bias is not None:
            done += self._bias
        return done.to(x.dtype)


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` in float32 with each token's numbers between -1 and 1, and what it was divided by."""
    exact = x.float()
    peaks = exact.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return exact / peaks, peaks


@torch.inference_mode()
def quantize_linears(model: Any, ids: Tensor, *, integers: bool) -> float:
    """Round the weights of a model's linear layers, all but the one that gives the scores.

    Args:
        ids: (1, tokens) to measure the effect on.
        integers: whether torch is to compute in integers; else the layers stay as they are, with weights that whole
            numbers hold, for `packing.py`.
    Returns: by how much the log-probability of the likeliest next token changes, on average.
    Raises: QuantizationError: it cannot be done here.
    """
    before = _log_probabilities(model, ids)
    likeliest = before.argmax(-1, keepdim=True)
    scoring = model.get_output_embeddings()
    for parent, name, linear in linears(model):
        if getattr(parent, name) is not scoring:
            setattr(parent, name, _quantized(linear) if integers else _rounded(linear))
    shift = _log_probabilities(model, ids).gather(-1, likeliest) - before.gather(-1, likeliest)
    return float(shift.abs().mean())


def in_integers(model: Any) -> bool:
    """Return whether a model computes in integers, where a last bit becomes a hundredth now and then."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    scores: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return functional.log_softmax(scores.float(), dim=-1)


def _rounded(linear: nn.Linear) -> nn.Linear:
    whole, scales = quantize_int8(linear.weight.detach())
    linear.weight = nn.Parameter(whole * scales, requires_grad=False)
    return linear


def _quantized(linear: nn.Linear) -> Int8Linear:
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
