"""Linear layers computed by a program of our own.

Weights lie in panels (gemm_packed.h), in the smallest type that holds them: a step for few tokens takes as long as it
takes to read them.  Layers in float32 compute in it whatever holds their weights; those in bfloat16 multiply in that
and add up in float32.  Knows no model; `packing.py` decides which layers are made so.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.worker.execution.native.native_build import CompileError, compile_program

PANEL = 16
"""Outputs whose weights lie together; panels come in pairs."""
SMALLEST = 1e-30
"""The greatest weight of an output that has none: its scale must not be nothing."""
LOSSLESS = 1e-7
"""What keeping weights in another type may change, as a share of their norm: as much as one rounding in float32."""


def fits_float16(weight: Tensor) -> bool:
    """Whether float16 holds the same numbers, as it does those of a bfloat16 checkpoint but for the very smallest."""
    lost = (weight.half().float() - weight).norm()
    return bool(lost <= LOSSLESS * weight.norm())


def fits_int8(weight: Tensor) -> bool:
    """Whether whole numbers and a scale for each output hold the same numbers, as they do once rounded."""
    return torch.equal(torch.mul(*in_int8(weight)), weight)


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights, (outputs, inputs), as the nearest whole numbers up to 127, and their scales, (outputs, 1).

    Scales have 16 bits, so that one times a whole number is exact and what was rounded once is found to be so.
    """
    peaks = weight.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / 127
    mantissa, exponent = torch.frexp(peaks)
    scales = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)
    return (weight / scales).round().to(torch.int8), scales


class PanelLinear(nn.Module):
    """A linear layer with its weights in panels."""

    LEAST = 60_000
    """A call costs a few microseconds more than torch's own, which smaller layers do not gain back."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises: CompileError: there is no program, or it does not take such a layer."""
        super().__init__()
        self.inputs, self.outputs, dtype = linear.in_features, linear.out_features, linear.weight.dtype
        if dtype not in {torch.float32, torch.bfloat16} or (dtype == torch.bfloat16 and self.inputs % 2):
            raise CompileError(f"the program does not take {self.inputs} inputs in {dtype}")
        self._program = products()
        weight, scales = self._smallest(linear.weight.detach())
        self.panels: Tensor = _in_panels(weight)
        """(panels, inputs, PANEL, 1), an even number of them; in bfloat16 (panels, inputs / 2, PANEL, 2)"""
        self.scales: Tensor | None = scales
        """(outputs,) of whole numbers"""
        bias: Any = linear.bias
        self.bias: Tensor | None = None if bias is None else bias.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)"""
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        self._program.compute(x, self, out)
        return out

    def _smallest(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights in the smallest type that holds them, and their scales if they have any."""
        if weight.dtype == torch.bfloat16:
            return weight, None
        # A first output, which nearly always says no, spares large models the rounding of all weights at load.
        if fits_int8(weight[:1]) and fits_int8(weight):
            whole, scales = in_int8(weight)
            return whole, scales.flatten()
        return weight.half() if self._program.halves and fits_float16(weight) else weight, None


class _Products:
    """The compiled program."""

    def __init__(self) -> None:
        library = compile_program("gemm_packed")
        self.halves = hasattr(library, "linear_halves")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._ways = {
            torch.float32: library.linear_floats,
            torch.bfloat16: library.linear_bfloats,
            torch.int8: library.linear_bytes,
        }
        if self.halves:
            self._ways[torch.float16] = library.linear_halves
        for way in self._ways.values():
            way.argtypes = [*[pointer] * 5, *[number] * 3, ctypes.c_int]
            way.restype = None

    def compute(self, x: Tensor, layer: PanelLinear, out: Tensor) -> None:
        """Compute (..., inputs) to (..., outputs), both without gaps."""
        self._ways[layer.panels.dtype](
            x.data_ptr(),
            layer.panels.data_ptr(),
            None if layer.scales is None else layer.scales.data_ptr(),
            None if layer.bias is None else layer.bias.data_ptr(),
            out.data_ptr(),
            x.numel() // layer.inputs,
            layer.inputs,
            layer.outputs,
            torch.get_num_threads(),
        )


def products() -> _Products:
    """Return the program, compiled once.

    Raises: CompileError: there is none.
    """
    made = _made()
    if isinstance(made, CompileError):
        raise made
    return made


@cache
def _made() -> _Products | CompileError:
    # The error is kept as well: a compiler that hangs is not waited for by each layer.
    try:
        return _Products()
    except CompileError as error:
        return error


def _in_panels(weight: Tensor) -> Tensor:
    """(outputs, inputs) to (panels, inputs, PANEL, 1), in bfloat16 (panels, inputs / 2, PANEL, 2)"""
    outputs, inputs = weight.shape
    together = 2 if weight.dtype == torch.bfloat16 else 1
    whole = functional.pad(weight, (0, 0, 0, -outputs % (2 * PANEL)))
    return whole.view(-1, PANEL, inputs // together, together).transpose(1, 2).contiguous()
