"""Choose how a model is executed on the device at hand, as `model.compile` says.

The torch way is always there.  Every other way is optional: it is installed, its logits are compared with torch's on
this very model, and on any error or difference the model is restored and torch computes instead.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from app.ipc.messages import Compile
from app.worker.execution import private_api
from app.worker.execution.base import ExecutorUnavailableError, OptionalExecutor
from app.worker.execution.graphs.cuda_graphs import CudaGraphs
from app.worker.execution.graphs.graph_executor import GraphExecutor, Record
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.native.native_executors import (
    NativeAttentionExecutor,
    NativeDecoderExecutor,
    pack_native_linears,
)
from app.worker.execution.native.packed_linear import gemm_kernels
from app.worker.execution.torch.prepacked_linear import prepack_linears

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far native logits may be from torch's in any case, as a share of their norm; more where rounding explains it."""
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The same for logits of layers that torch has compiled, and of recorded passes."""


def select_executor(runner: ModelRunner, setting: Compile, *, keep_layers: bool = False) -> None:
    """Replace a runner's executor by the fastest that computes the same; its KV cache must be empty, and is used.

    Args: keep_layers: whether the model's own forward pass must go on to work, beside the executor.
    Raises:
        ExecutorUnavailableError: `layers` is required and not available.
        torch.OutOfMemoryError, MemoryError: there is no memory left for the model.
    """
    if runner.model.device.type == "cpu":
        _select_on_cpu(runner, setting, keep_layers)
        return
    if setting == "layers":
        _required(lambda: _install_compiled_layers(runner))
    if setting != "none" and runner.model.device.type == "cuda":
        _optional("decoding is", lambda: install_graphs(runner, CudaGraphs().record))


def _install_compiled_layers(runner: ModelRunner) -> None:
    # Registers an operator with torch when it is imported; nobody else should depend on that.
    from app.worker.execution.compiled.torch_compile import TorchCompileExecutor

    executor = TorchCompileExecutor(runner.executor, runner.model, runner.cache)
    install_verified(runner, executor, COMPILED_TOLERANCE.get(runner.model.dtype, 0))


def install_graphs(runner: ModelRunner, record: Record) -> None:
    """Let a runner decode in recorded passes.

    Raises: ExecutorUnavailableError: their logits differ, or there is no memory for them.  Whatever `record` raises.
    """
    tolerance = COMPILED_TOLERANCE.get(runner.model.dtype, 0)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in runner.model.parameters())
    executor = GraphExecutor(
        runner.executor,
        runner.cache,
        record,
        lambda found, expected: runner.verify_logits(found, expected, tolerance),
        # A pass reads all weights once.
        pass_keys=weight_bytes // max(1, runner.cache.bytes_per_token),
    )
    try:
        install_verified(runner, executor, tolerance)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise ExecutorUnavailableError("there is no memory for its graphs") from error


def _select_on_cpu(runner: ModelRunner, setting: Compile, keep_layers: bool) -> None:
    if setting == "layers":
        _required(lambda: _install_decoder(runner))
        return
    # oneDNN multiplies bfloat16 in AMX tiles, which the native kernels do not use.
    native = setting == "auto" and not (runner.model.dtype == torch.bfloat16 and _has_amx())
    if native and not keep_layers and _optional("layers are", lambda: _install_decoder(runner)):
        return
    if setting == "auto":
        _optional("attention is", lambda: _install_attention(runner))
    if native:
        _optional("linear layers are", lambda: pack_native_linears(runner.model))
    _optional("weights are not packed, linear layers are", lambda: prepack_linears(runner.model))


def _install_decoder(runner: ModelRunner) -> None:
    executor = NativeDecoderExecutor(runner.model, runner.cache)
    install_verified(runner, executor, TOLERANCE.get(runner.model.dtype, 0))


def _install_attention(runner: ModelRunner) -> None:
    executor = NativeAttentionExecutor(runner.executor, runner.cache)
    install_verified(runner, executor, TOLERANCE.get(runner.model.dtype, 0))


def install_verified(runner: ModelRunner, executor: OptionalExecutor, tolerance: float) -> None:
    """Give a runner an optional executor, or leave it and its model as they were.

    Raises: ExecutorUnavailableError: the executor's logits differ from those of before.  Whatever `install` and
        `forward` raise.
    """
    reference, previous = runner.reference_logits(), runner.executor
    try:
        executor.install()
        runner.executor = executor
        runner.verify_equivalence(reference, tolerance)
    except BaseException:
        runner.executor = previous
        executor.uninstall()
        runner.clear_reference_slots()
        raise


def _has_amx() -> bool:
    try:
        return private_api.cpu_has_amx()
    except Exception as error:  # noqa: BLE001  # see `_optional`
        log.warning("whether this processor has AMX is not known: %s", _reason(error))
        return False


def _optional(what: str, install: Callable[[], object]) -> bool:
    """Run an installation that the model can do without; log and return whether it succeeded."""
    try:
        install()
    except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001  # compilers, private operators and renamed attributes fail in any way
        log.warning("%s left to torch: %s", what, _reason(error))
        return False
    return True


def _required(install: Callable[[], object]) -> None:
    """Run an installation that the configuration requires.

    Raises: ExecutorUnavailableError: it failed.
    """
    try:
        install()
    except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError, ExecutorUnavailableError):
        raise
    except Exception as error:
        raise ExecutorUnavailableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return one line for the log or the operator."""
    message = next(iter(str(error).strip().splitlines()), "")
    return message if isinstance(error, ExecutorUnavailableError) else f"{type(error).__name__}: {message}"


def native_linears_unavailable() -> str | None:
    """Return why there are no native linear layers on this machine; None where there are."""
    try:
        gemm_kernels()
    except Exception as error:  # noqa: BLE001  # see `_optional`
        return _reason(error)
    return None


def pack_quantized_linears(model: Any) -> None:
    """Store the int8 weights of a model that the serial runner executes in 8 bits, if the native kernels can."""
    _optional("int8 linear layers are", lambda: pack_native_linears(model))
