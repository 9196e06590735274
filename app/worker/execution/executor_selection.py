"""What makes a model's passes faster on the device at hand, as `model.compile` says.

Whatever takes the place of torch's own operators is compared with them first, on this model, and left out where it
computes something else.  Decides which way is taken; knows nothing of how each works.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from app.ipc.messages import Compile
from app.worker.execution.compiled.torch_compile import compile_layers
from app.worker.execution.model_runner import QUANTIZED, RowModel
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.native_decoder import NativeDecoder, check_supported
from app.worker.execution.native.packed_linear import NativeLinear, gemm_kernels
from app.worker.execution.torch.quantization import in_integers
from app.worker.execution.torch.weight_packing import OF_TORCH, pack_linears

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far scores may be from those computed by torch, as a share of their norm; in bfloat16 its own are as far off."""


def accelerate(rows: RowModel, setting: Compile) -> None:
    """Make a model that serves in rows faster; its rows must be empty, and are used.

    Raises: CompileError: compiled layers were asked for and cannot be had.
    """
    if rows.model.device.type != "cpu":
        if setting == "layers":
            compile_layers(rows)
        return
    # Who asks for our layers gets them all the same.
    tiles = setting != "layers" and _multiplied_in_tiles(rows.model)
    if setting in {"auto", "layers"} and not tiles:
        try:
            _add_layers(rows)
        except CompileError as error:
            if setting == "layers":
                raise
            log.warning("layers are left to torch: %s", error)
    if rows.layers is None:
        if setting != "none":
            tolerance = TOLERANCE.get(rows.model.dtype, 0) + (QUANTIZED if in_integers(rows.model) else 0)
            _add_attention(rows, tolerance)
        pack_linears(rows.model, OF_TORCH if setting == "none" or tiles else None)


def _multiplied_in_tiles(model: Any) -> bool:
    """Return whether the processor has instructions for whole matrices of such numbers (AMX), which oneDNN uses and our
    programs do not."""
    return model.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _add_layers(rows: RowModel) -> None:
    """Raises: CompileError: they cannot be compiled, or compute something else."""
    check_supported(rows.model)
    gemm_kernels()

    def add() -> None:
        pack_linears(rows.model, [NativeLinear], least=0)
        rows.layers = NativeDecoder(rows.model, rows.cache)

    def remove() -> None:
        rows.layers = None

    _compare(rows, add, remove, TOLERANCE[rows.model.dtype])


def _add_attention(rows: RowModel, tolerance: float) -> None:
    def remove() -> None:
        rows.cache.compiled = None

    try:
        _compare(rows, rows.cache.compile, remove, tolerance)
    except CompileError as error:
        log.warning("attention is left to torch: %s", error)


def _compare(rows: RowModel, add: Callable[[], None], remove: Callable[[], None], tolerance: float) -> None:
    """Raises: CompileError: it cannot be added, or changes the scores."""
    before = rows.probe()
    add()
    difference = rows.apart(before)
    if not difference <= tolerance:
        remove()
        # Numbers that are none would spoil what torch computes from now on.
        for row in range(min(2, rows.cache.rows)):
            rows.cache.clear(row)
        raise CompileError(f"its scores differ by {difference:.2%} when it is compiled")
