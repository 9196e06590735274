"""Weight formats smaller than float32: which weights fit them, and int8 quantization of a whole model at load.

What quantization does to log-probabilities is measured when a model is loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution.linear_modules import linear_modules

MIN_ABSMAX = 1e-30
"""Lower bound of a channel's absolute maximum, so an all-zero channel has a non-zero scale."""
LOSSLESS = 1e-7
"""Largest change that another weight format may bring, as a share of the weights' norm: one rounding in float32."""
SAMPLE_TEXT = (
    "The harbour was quiet when the ferry came in. Two boys carried a crate of oranges along the pier, and a woman in "
    "a green coat asked them what the price was. It had rained in the night; the stones were still dark, and from the "
    "café on the corner came the smell of bread. In 1987, she said, a crate had cost three coins, and nobody counted."
)
"""The text on which the effect is measured, in the model's own tokens."""
MAX_SAMPLE_TOKENS = 256


class QuantizationError(Exception):
    """The model cannot be quantized on this processor; the message says why."""


def fits_float16(weight: Tensor) -> bool:
    """Return whether float16 represents the same numbers, as it does for a bfloat16 checkpoint but for the smallest."""
    lost = (weight.half().float() - weight).norm()
    return bool(lost <= LOSSLESS * weight.norm())


def fits_int8(weight: Tensor) -> bool:
    """Return whether 8-bit integers and a scale per output represent the same numbers, as they do once quantized."""
    return torch.equal(torch.mul(*quantize_int8(weight)), weight)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights, (outputs, inputs), as the nearest integers up to 127, and their scales, (outputs, 1).

    Scales have 16 bits, so that one times an integer is exact and quantizing again changes nothing.
    """
    peaks = weight.abs().amax(1, keepdim=True).clamp(min=MIN_ABSMAX) / 127
    mantissa, exponent = torch.frexp(peaks)
    scales = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return (weight / scales).round().to(torch.int8), scales


def round_to_int8(linear: nn.Linear) -> nn.Linear:
    """Round a layer's weights to what int8 represents; they are stored as floats until they are packed."""
    integers, scales = quantize_int8(linear.weight.detach())
    linear.weight = nn.Parameter(integers * scales, requires_grad=False)
    return linear


@torch.inference_mode()
def quantize_linears(model: Any, ids: Tensor, quantize: Callable[[nn.Linear], nn.Module]) -> float:
    """Quantize a model's linear layers, all but the one that computes the logits.

    Args:
        ids: (1, tokens) to measure the effect on.
        quantize: returns the layer that replaces an ordinary one.
    Returns: by how much the log-probability of the likeliest next token changes, on average.
    Raises: QuantizationError: `quantize` cannot do it here.
    """
    before = _log_probabilities(model, ids)
    likeliest = before.argmax(-1, keepdim=True)
    lm_head = model.get_output_embeddings()
    for parent, name, linear in linear_modules(model):
        if getattr(parent, name) is not lm_head:
            setattr(parent, name, quantize(linear))
    shift = _log_probabilities(model, ids).gather(-1, likeliest) - before.gather(-1, likeliest)
    return float(shift.abs().mean())


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return functional.log_softmax(logits.float(), dim=-1)
