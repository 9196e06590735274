"""Choose how a model is executed on the device at hand, as `model.compile` says.

The torch way is always there.  Every other way is optional: its logits are compared with torch's on this very model, it
is timed, and the fastest is installed; on any error or difference the model is restored and another way computes it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from app.ipc.messages import Compile
from app.worker.execution.base import ExecutorUnavailableError, OptionalExecutor
from app.worker.execution.graphs.attention_choice import faster_by_length
from app.worker.execution.graphs.cuda_graphs import CudaGraphs
from app.worker.execution.graphs.decode_attention import PassAttention
from app.worker.execution.graphs.graph_executor import GraphExecutor, Record
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.model_sample import shared_copy
from app.worker.execution.native.block_copier import NativeBlockCopier, block_copy_library
from app.worker.execution.native.decoder_weights import DecoderWeights
from app.worker.execution.native.native_executors import (
    NativeAttentionExecutor,
    NativeDecoderExecutor,
    pack_native_linears,
)
from app.worker.execution.native.packed_linear import gemm_kernels
from app.worker.execution.timing_cache import TimingCache
from app.worker.execution.torch.prepacked_linear import prepack_linears
from app.worker.execution.transformers_forward import TransformersForward
from app.worker.execution.way_timing import Measurement, WayTimer, shapes_of
from app.worker.execution.ways import Layout, MeasuredExecutor, TimeTable

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far native logits may be from torch's in any case, as a share of their norm; more where rounding explains it."""
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The same for logits of layers that torch has compiled, and of recorded passes."""


SHRINK = 7 / 8
"""Share of the slots that are left where all of them do not fit."""
Trial = Callable[[ModelRunner], object]
"""Computes the largest step, and raises what that raises."""


def select_executor(
    runner: ModelRunner,
    setting: Compile,
    *,
    keep_layers: bool = False,
    copies: int = 1,
    largest_step: Trial = lambda runner: None,
) -> None:
    """Replace a runner's executor by the fastest that computes the same; its KV cache must be empty, and is used.

    Args:
        keep_layers: whether the model's own forward pass must go on to work, beside the executor.
        copies: forms of the weights that may be in memory at once.
        largest_step: is tried on a GPU, with the graphs in memory; where it does not fit, there are fewer slots.
    Raises:
        ExecutorUnavailableError: `layers` is required and not available.
        torch.OutOfMemoryError, MemoryError: there is no memory left for the model.
    """
    if runner.model.device.type == "cpu":
        WaySelection(runner, cpu_layouts(setting, keep_layers)).select(copies, required=setting == "layers")
        if setting != "none":
            _optional("copies to the prefix cache are", lambda: _copy_natively(runner.cache))
        return
    if setting == "layers":
        _required(lambda: _install_compiled_layers(runner))
    if runner.model.device.type == "cuda":
        fit_slots(runner, largest_step, graphs=setting != "none")


def _copy_natively(cache: KVCache) -> None:
    """Let a kernel library copy to and from the prefix cache.

    Raises: CompileError: it cannot be built.
    """
    block_copy_library()
    cache.make_block_copier = NativeBlockCopier


def fit_slots(runner: ModelRunner, largest_step: Trial, *, graphs: bool) -> None:
    """Record the passes that decode, if `graphs`, and keep as many slots as leave memory for the largest step."""
    others, slots = runner.executor, runner.cache.slots
    while not (fits := _fits(runner, largest_step, graphs=graphs)) and runner.cache.slots > 1:
        if isinstance(runner.executor, GraphExecutor):
            runner.executor.uninstall()
            runner.executor = others
        runner.cache.shrink(max(1, int(SHRINK * runner.cache.slots)))
    if runner.cache.slots < slots:
        log.warning("memory has room for %d sequences at once, not for %d", runner.cache.slots, slots)
    if not fits:
        log.warning("memory has no room for graphs and the longest chunk of a prompt: it is computed in pieces")


def _fits(runner: ModelRunner, largest_step: Trial, *, graphs: bool) -> bool:
    """Return whether there is memory for graphs and the largest step."""
    try:
        if graphs:
            _optional("decoding is", lambda: install_graphs(runner, CudaGraphs().record))
        largest_step(runner)
    except torch.OutOfMemoryError:
        return False
    except torch.AcceleratorError:
        raise
    except Exception as error:  # noqa: BLE001  # requests fail by themselves, and say why
        log.warning("the largest step cannot be tried: %s", _reason(error))
    return True


def _install_compiled_layers(runner: ModelRunner) -> None:
    # Registers an operator with torch when it is imported; nobody else should depend on that.
    from app.worker.execution.compiled.torch_compile import TorchCompileExecutor

    executor = TorchCompileExecutor(runner.executor, runner.model, runner.cache)
    install_verified(runner, executor, COMPILED_TOLERANCE.get(runner.model.dtype, 0))


def install_graphs(runner: ModelRunner, record: Record) -> None:
    """Let a runner decode in recorded passes; what samples may be recorded, too.

    Raises: ExecutorUnavailableError: their logits differ.  Whatever `record` raises.
    """
    runner.record = record
    what, by_length = "attention in recorded passes is", dict[int, PassAttention]()
    _optional(what, lambda: by_length.update(faster_by_length(runner.cache, record)))
    if not by_length or not _optional(what, lambda: _install_graphs(runner, record, by_length)):
        _install_graphs(runner, record, {})


def _install_graphs(runner: ModelRunner, record: Record, by_length: Mapping[int, PassAttention]) -> None:
    tolerance = COMPILED_TOLERANCE.get(runner.model.dtype, 0)
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in runner.model.parameters())
    executor = GraphExecutor(
        runner.executor,
        runner.cache,
        record,
        lambda found, expected: runner.verify_logits(found, expected, tolerance),
        # A pass reads all weights once.
        pass_keys=weight_bytes // max(1, runner.cache.bytes_per_token),
        by_length=by_length,
    )
    install_verified(runner, executor, tolerance)


def cpu_layouts(setting: Compile, keep_layers: bool) -> list[Layout]:
    """Return the forms of the weights to choose from, the one first that is taken where nothing can be measured."""
    if setting == "none":
        return [Layout("prepacked", _torch_ways)]
    layers = Layout("panels of layers", _decoder_ways, takes_weights=True)
    if setting == "layers":
        return [layers]
    others = [Layout("panels", _native_linear_ways), Layout("prepacked", _prepacked_ways)]
    return others if keep_layers else [layers, *others]


def _decoder_ways(model: Any, cache: KVCache) -> dict[str, OptionalExecutor]:
    weights = DecoderWeights(model)
    ways: dict[str, OptionalExecutor] = {"native layers": NativeDecoderExecutor(model, cache, weights)}
    if native_linears_unavailable() is None and "tiles" in gemm_kernels().kernels:
        ways["native layers, tiles"] = NativeDecoderExecutor(model, cache, weights, kernel="tiles")
    return ways


def _native_linear_ways(model: Any, cache: KVCache) -> dict[str, OptionalExecutor]:
    forward = TransformersForward(model, cache, _pack_native)
    return {
        "native linears, native attention": NativeAttentionExecutor(forward, cache),
        "native linears, torch attention": forward,
    }


def _prepacked_ways(model: Any, cache: KVCache) -> dict[str, OptionalExecutor]:
    forward = TransformersForward(model, cache, prepack_linears)
    return {
        "torch linears, native attention": NativeAttentionExecutor(forward, cache),
        "torch linears, torch attention": forward,
    }


def _torch_ways(model: Any, cache: KVCache) -> dict[str, OptionalExecutor]:
    return {"torch linears, torch attention": TransformersForward(model, cache, prepack_linears)}


def _pack_native(model: Any) -> None:
    """Pack the linear layers that the native kernels support, and others as torch can.

    Raises: CompileError: there are no kernels.
    """
    gemm_kernels()
    pack_native_linears(model)
    prepack_linears(model)


class WaySelection:
    """Measures the ways of some layouts, and gives a runner those that are the fastest."""

    def __init__(self, runner: ModelRunner, layouts: Sequence[Layout]) -> None:
        """Args: layouts: the one first that is taken where nothing can be measured."""
        self._runner = runner
        self._layouts = layouts
        self._names = [[*layout.ways(runner.model, runner.cache)] for layout in layouts]
        self._torch = runner.executor
        self._tolerance = TOLERANCE.get(runner.model.dtype, 0)

    def select(self, copies: int, *, required: bool = False) -> None:
        """Install the fastest way, or several where each is the fastest for some steps; if all fail, torch's remains.

        Args:
            copies: layouts that may be in memory at once.
            required: whether one has to succeed.
        Raises: ExecutorUnavailableError: one is required, and all fail.
        """
        table, failures = self._measure()
        failures, ways = dict(failures), dict[str, OptionalExecutor]()
        while table.seconds and not ways:
            try:
                ways = self._install(table, copies)
            except _WayFailedError as failed:
                failures[failed.way] = failed.error
                table = table.without(failed.way)
        if required and not ways:
            raise _unavailable(next(iter(failures.values())))
        _log_failures(failures)
        if ways:
            self._runner.executor = MeasuredExecutor(ways, table) if len(ways) > 1 else next(iter(ways.values()))
            self._runner.step_times = table.describe(ways)

    def _measure(self) -> Measurement:
        """Return what steps take in each way; nothing is measured where that decides nothing, or cannot be done."""
        runner, names = self._runner, [name for names in self._names for name in names]
        unmeasured = Measurement(TimeTable({name: {} for name in names}), {})
        if len(names) == 1:
            return unmeasured
        timings = TimingCache(runner.model, names, shapes_of(runner.cache))
        if (known := timings.read()) is not None:
            return known
        try:
            measured = WayTimer(runner, self._layouts, self._verify).measure()
        except ValueError as error:
            log.warning("the ways of execution cannot be measured, and the first that works is taken: %s", error)
            return unmeasured
        if measured.table.seconds and not measured.table.shapes:
            # No warning: nothing is wrong, the next load measures, and a program that reads a model prints warnings.
            log.info("this machine is too busy to measure ways of execution: the first that works is taken")
        timings.write(measured)
        return measured

    def _verify(self, sample: ModelRunner, way: OptionalExecutor) -> None:
        install_verified(sample, way, self._tolerance)

    def _install(self, table: TimeTable, copies: int) -> dict[str, OptionalExecutor]:
        """Install the ways that are the fastest, the one that is used most first, or leave the model as it was.

        Raises: _WayFailedError: one of them fails.
        """
        offered = [[name for name in names if name in table.seconds] for names in self._names]
        chosen = table.choose(offered, copies)
        used = table.used([name for index in chosen for name in offered[index]])
        layouts = [self._layouts[index] for index in chosen if not set(used).isdisjoint(offered[index])]
        # The last takes the place of the model's own weights; the others are made beside them.
        layouts.sort(key=lambda layout: not layout.takes_weights)
        installed: dict[str, OptionalExecutor] = {}
        for layout in layouts:
            model = self._runner.model if layout is layouts[-1] else shared_copy(self._runner.model)
            for name, way in layout.ways(model, self._runner.cache).items():
                if name in used:
                    self._install_one(name, way, installed)
        return {name: installed[name] for name in used}

    def _install_one(self, name: str, way: OptionalExecutor, installed: dict[str, OptionalExecutor]) -> None:
        """Add one way to those that are installed, or uninstall them all.

        Raises: _WayFailedError: it fails.
        """
        try:
            install_verified(self._runner, way, self._tolerance)
        except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # compilers, private operators and renamed attributes fail in any way
            for each in reversed(installed.values()):
                each.uninstall()
            self._runner.executor = self._torch
            raise _WayFailedError(name, error) from error
        installed[name] = way


class _WayFailedError(Exception):
    """A way could not be installed, or its logits differ."""

    def __init__(self, way: str, error: Exception) -> None:
        super().__init__(way)
        self.way = way
        self.error = error


def _log_failures(failures: Mapping[str, Exception]) -> None:
    """Log which ways cannot be used, those with the same reason in one line."""
    reasons: dict[str, list[str]] = {}
    for way, error in failures.items():
        reasons.setdefault(_reason(error), []).append(way)
    for reason, ways in reasons.items():
        log.warning("not computed by %s: %s", " or by ".join(ways), reason)


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
    except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> ExecutorUnavailableError:
    return error if isinstance(error, ExecutorUnavailableError) else ExecutorUnavailableError(_reason(error))


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
