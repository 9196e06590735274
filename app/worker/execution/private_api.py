"""Everything that the worker uses of torch and transformers that their documentation does not promise.

One function for each reliance, so that a new release of either library breaks here, in the tests of this module, and
nowhere else.  Callers treat all of it as optional: an error means that the feature is not available.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ONEDNN_TOKENS = 8
"""The batch size that oneDNN's weight layout is chosen for; others are computed as well."""

LinearKernel = Callable[[Tensor], Tensor]
"""(..., inputs) to (..., outputs)"""


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16 matrix products."""
    if torch.backends.cpu.get_cpu_capability().startswith("SVE"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_has_vnni() -> bool:
    """Return whether the processor adds up products of 8-bit integers in 32 bits."""
    return torch.cpu._is_vnni_supported()


def onednn_linear(weight: Tensor, bias: Tensor | None) -> LinearKernel:
    """Return a linear layer whose float32 or bfloat16 weights, (outputs, inputs), are in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_TOKENS)

    def compute(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return out

    return compute


def fbgemm_float16_linear(weight: Tensor, bias: Tensor | None) -> LinearKernel:
    """Return a linear layer in float32 whose weights, (outputs, inputs), are stored as float16 (x86 only)."""
    packed: Any = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def compute(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        return out

    return compute


class Int8Weights:
    """The weights of a linear layer as 8-bit integers, packed for FBGEMM or oneDNN."""

    def __init__(self, weight: Tensor, scales: Tensor) -> None:
        """Args: weight: (outputs, inputs) float32; scales: (outputs,), what one step of each output is worth."""
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
        self._packed: Any = torch.ops.quantized.linear_prepack(quantized, None)

    def multiply(self, x: Tensor, step: float, zero_point: int) -> Tensor:
        """Round `x` to multiples of `step` around `zero_point`, multiply in integers, and return float32."""
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, step, zero_point, self._packed
        )
        return out

    def dequantized(self) -> Tensor:
        """Return the weights that the integers stand for, (outputs, inputs) float32."""
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        dequantized: Tensor = weight.dequantize()
        return dequantized


def treat_module_integers_as_inputs() -> None:
    """Have torch.compile share code between layers that differ only in integer attributes, such as `layer_idx`."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


def undo_module_compile(module: nn.Module) -> None:
    """Reverse `module.compile()`, for which torch has no call."""
    module._compiled_call_impl = None


def attention_implementation(model: Any) -> str:
    """Return the name of the attention function that a transformers model uses."""
    name: str = model.config._attn_implementation
    return name


def can_set_attention(model: Any) -> bool:
    """Return whether a transformers model calls whichever attention function is set."""
    return bool(model._can_set_attn_implementation())


def decoder_layer_names(model: Any) -> set[str]:
    """Return the class names of a model's decoder layers: what transformers never splits over two GPUs."""
    return set(model._no_split_modules or ())
