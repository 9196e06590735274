"""Linear layers computed by native GEMM kernels over packed weights.

Weights are stored in panels (gemm_packed.h), in the smallest type that holds them without loss: a step for few tokens
takes as long as reading them once.  Layers in float32 compute in float32 whatever type their weights are stored in;
layers in bfloat16 multiply in bfloat16 and accumulate in float32.  `executor_selection.py` decides which layers are
replaced.
"""

import ctypes
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution.native.native_build import CompileError, Toolchain, build_kernel_library, toolchain
from app.worker.execution.quantization import fits_float16, fits_int8, quantize_int8

GemmKernel = Literal["panels", "tiles"]
"""How products are computed: in vectors, or in tiles where the processor has them (amx_tiles.h), float32 activations as
sums of bfloat16 (split_tiles.h).  Both read the same packed weights; their results differ by rounding."""
NR = 16
"""Outputs of one panel (gemm_packed.h); panels come in pairs."""


class NativeLinear(nn.Module):
    """A linear layer whose packed weights are multiplied by the native GEMM kernel; for inference on a CPU."""

    MIN_WEIGHTS = 60_000
    """A call costs a few microseconds more than torch's own, which smaller layers do not gain back."""

    def __init__(self, linear: nn.Linear) -> None:
        """Pack the weights of a layer.

        Raises: CompileError: the kernels cannot be built, or do not support this layer.
        """
        super().__init__()
        self.in_features, self.out_features, dtype = linear.in_features, linear.out_features, linear.weight.dtype
        if dtype not in {torch.float32, torch.bfloat16} or (dtype == torch.bfloat16 and self.in_features % 2):
            raise CompileError(f"there is no kernel for {self.in_features} inputs in {dtype}")
        self._kernels = gemm_kernels()
        weight, scales = self._smallest(linear.weight.detach())
        self.packed_weight: Tensor = _pack(weight)
        """(panels, inputs, NR, 1) with an even number of panels; in bfloat16 (panels, inputs / 2, NR, 2)."""
        self.scales: Tensor | None = scales
        """(outputs,) of int8 weights."""
        bias: Any = linear.bias
        self.bias: Tensor | None = None if bias is None else bias.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., inputs) to (..., outputs)."""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        self._kernels.linear(x, self, out)
        return out

    def unpacked_weight(self) -> Tensor:
        """Return the weights as an ordinary layer stores them, (outputs, inputs) in the layer's compute type."""
        weight = self.packed_weight.transpose(1, 2).reshape(-1, self.in_features)[: self.out_features]
        if self.scales is not None:
            return weight * self.scales[:, None]
        return weight if weight.dtype == torch.bfloat16 else weight.float()

    def _smallest(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights in the smallest type that holds them, and the scales of int8 ones."""
        if weight.dtype == torch.bfloat16:
            return weight, None
        # The first output nearly always decides against int8, which saves large models the rounding of all weights.
        if fits_int8(weight[:1]) and fits_int8(weight):
            quantized, scales = quantize_int8(weight)
            return quantized, scales.flatten()
        return weight.half() if self._kernels.has_float16 and fits_float16(weight) else weight, None


class GemmKernels:
    """Calls the GEMM kernel library, which is the same for all models."""

    def __init__(self) -> None:
        """Build the library.

        Raises: CompileError: there is no compiler, or it fails.
        """
        library = build_kernel_library("gemm_packed")
        self.has_float16 = hasattr(library, "llmk_linear_f16")
        """Whether the processor converts float16, so that weights may be stored in it."""
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._by_weight_type = {
            torch.float32: library.llmk_linear_f32,
            torch.bfloat16: library.llmk_linear_bf16,
            torch.int8: library.llmk_linear_i8,
        }
        if self.has_float16:
            self._by_weight_type[torch.float16] = library.llmk_linear_f16
        self.kernels: tuple[GemmKernel, ...] = ("panels", "tiles") if _tiles_work(library) else ("panels",)
        """Those that work on this machine."""
        for function in self._by_weight_type.values():
            function.argtypes = [*[pointer] * 5, *[number] * 3, ctypes.c_int]
            function.restype = None

    def linear(self, x: Tensor, layer: NativeLinear, out: Tensor) -> None:
        """Compute a layer of x (..., inputs) into out (..., outputs), both contiguous."""
        self._by_weight_type[layer.packed_weight.dtype](
            x.data_ptr(),
            layer.packed_weight.data_ptr(),
            None if layer.scales is None else layer.scales.data_ptr(),
            None if layer.bias is None else layer.bias.data_ptr(),
            out.data_ptr(),
            x.numel() // layer.in_features,
            layer.in_features,
            layer.out_features,
            torch.get_num_threads(),
        )


def _tiles_work(library: ctypes.CDLL) -> bool:
    """Ask for the processor's tiles and try them out."""
    return hasattr(library, "llmk_tiles_work") and library.llmk_tiles_work() == 1


def gemm_kernels() -> GemmKernels:
    """Return the GEMM kernels, built once for each toolchain.

    Raises: CompileError: they cannot be built.
    """
    built = _build(toolchain())
    if isinstance(built, CompileError):
        raise built
    return built


@cache
def _build(_toolchain: Toolchain) -> GemmKernels | CompileError:
    # The error is cached as well, so that the layers of a model do not each wait for a compiler that hangs.
    try:
        return GemmKernels()
    except CompileError as error:
        return error


def _pack(weight: Tensor) -> Tensor:
    """Reorder (outputs, inputs) to (panels, inputs, NR, 1), in bfloat16 to (panels, inputs / 2, NR, 2)."""
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    padded = functional.pad(weight, (0, 0, 0, -outputs % (2 * NR)))
    return padded.view(-1, NR, inputs // pair, pair).transpose(1, 2).contiguous()
