"""Measure what steps of some shapes take in each way of execution, on some layers of the model.

A layer costs what its neighbours do, so that a few show which way is the fastest, in about a second and with little
memory, also of a large model.  Those of small steps are so many that no cache of the processor holds their weights, as
in a step of the whole model.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from app.worker.execution.base import Executor, OptionalExecutor
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.model_runner import ModelRunner
from app.worker.execution.model_sample import sample_model
from app.worker.execution.packed_batch import Segment
from app.worker.execution.transformers_forward import TransformersForward
from app.worker.execution.ways import Layout, Shape, TimeTable

DECODES = (1, 4, 8, 16, 32)
PROMPTS = (16, 64, 256, 512)
KEYS = 128
"""Tokens of each sequence before the one that is decoded."""
SMALL_STEP_WEIGHTS = 32_000_000
"""Weights of the layers that steps of few tokens are measured on: in 8 bits as much as the last cache usually holds."""
LARGE_STEP_TOKENS = 64
"""Steps of so many tokens compute for so long that fewer layers show it."""
LARGE_STEP_WEIGHTS = 20_000_000
BUDGET_SECONDS = 1.0
"""For all ways together; each step is measured once whatever it takes."""
MAX_ROUNDS = 4
CONTENDER = 1.5
"""A way that takes so many times as long as the best is not measured again, and not with longer prompts."""
MAX_WAITED = 0.2
"""Share of the time that threads may have waited for a processor; of a busier machine the times say nothing."""
MIN_OBSERVED_SECONDS = 0.1
"""For how long a machine is observed before it is called busy."""
MAX_STEP_SECONDS = 0.5
"""Prompts that would take longer are left out: shorter ones show what a token costs."""

Verify = Callable[[ModelRunner, OptionalExecutor], None]
"""Installs an executor, or raises anything if it fails or its logits are not those of before."""


class Measurement(NamedTuple):
    """The measured step times of the ways that can be used, and the errors of those that cannot."""

    table: TimeTable
    """Without times where the machine was too busy."""
    failures: Mapping[str, Exception]


class _BusyMachineError(Exception):
    """Other programs use the processors."""


def shapes_of(cache: KVCache) -> list[Shape]:
    """Return the shapes that are measured, as far as the KV cache has room for them."""
    decodes = [Shape("decode", rows) for rows in DECODES if rows <= cache.slots]
    prompts = {min(tokens, cache.length) for tokens in PROMPTS}
    return [*decodes, *(Shape("prompt", tokens) for tokens in sorted(prompts))]


class WayTimer:
    """Verifies and times the ways of some layouts, one after the other."""

    def __init__(self, runner: ModelRunner, layouts: Sequence[Layout], verify: Verify) -> None:
        """Args: runner: of the model, whose KV cache has been written to and is empty."""
        self._runner = runner
        self._layouts = layouts
        self._verify = verify
        shapes = shapes_of(runner.cache)
        self._small = [shape for shape in shapes if shape.tokens < LARGE_STEP_TOKENS]
        self._large = [shape for shape in shapes if shape.tokens >= LARGE_STEP_TOKENS]
        self._names = [name for layout in layouts for name in layout.ways(runner.model, runner.cache)]
        self._limit = BUDGET_SECONDS / (2 * len(self._names))
        self._seconds: dict[str, dict[Shape, float]] = {}
        self._failures: dict[str, Exception] = {}
        self._observed = self._waited = 0.0
        """Seconds of all measurements, and for how long threads waited in them."""

    @torch.inference_mode()
    def measure(self) -> Measurement:
        """Measure all; overwrites tokens of the KV cache.

        Raises: ValueError: the model cannot be copied.
        """
        with suppress(_BusyMachineError):
            for layout in self._layouts:
                # Few layers prove what a way computes as well as many do.
                self._measure(layout, LARGE_STEP_WEIGHTS, self._large, self._verify)
                self._measure(layout, SMALL_STEP_WEIGHTS, self._small, _install)
        if self._is_busy():
            self._seconds.clear()
        usable = [name for name in self._names if name not in self._failures]
        table = {name: _plausible(self._seconds.get(name, {})) for name in usable}
        return Measurement(TimeTable(table), self._failures)

    def _measure(self, layout: Layout, weights: int, shapes: Sequence[Shape], install: Verify) -> None:
        """Time steps of some shapes on layers with so many weights.

        Raises: _BusyMachineError.
        """
        model, scale = sample_model(self._runner.model, weights if layout.packs else None)
        cache = self._runner.cache
        sample = ModelRunner(model, cache, TransformersForward(model, cache), noise=self._runner.noise)
        for name, way in layout.ways(model, cache).items():
            if name in self._failures:
                continue
            try:
                install(sample, way)
                self._time(name, shapes, partial(self._run, sample, way, scale))
            except (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError, _BusyMachineError):
                raise
            except Exception as error:  # noqa: BLE001  # compilers and private operators fail in any way
                self._failures[name] = error
                self._seconds.pop(name, None)

    def _time(self, name: str, shapes: Sequence[Shape], run: Callable[[Shape], float]) -> None:
        """Measure steps in rounds, so that what disturbs one run of a step spares another; the least of each counts.

        Whatever else goes on only adds to a time.

        Raises: _BusyMachineError.
        """
        began, best = time.perf_counter(), self._seconds.setdefault(name, {})
        for shape in shapes:
            if self._is_worth_measuring(name, shape):
                best[shape] = run(shape)
        again = [shape for shape in shapes if shape in best]
        for shape in again * (MAX_ROUNDS - 1):
            if time.perf_counter() - began > self._limit or not self._is_contender(name, again):
                return
            best[shape] = min(best[shape], run(shape))

    def _run(self, sample: ModelRunner, way: Executor, scale: float, shape: Shape) -> float:
        """Return the seconds that a step would take on the whole model.

        Raises: _BusyMachineError: threads have waited for a processor, in this step or those before it.
        """
        began, waited = time.perf_counter(), waited_seconds()
        seconds = step_seconds(sample, way, shape)
        self._observed += time.perf_counter() - began
        self._waited += waited_seconds() - waited
        if self._observed > MIN_OBSERVED_SECONDS and self._is_busy():
            raise _BusyMachineError
        return scale * seconds

    def _is_busy(self) -> bool:
        return self._waited > MAX_WAITED * self._observed

    def _is_worth_measuring(self, name: str, shape: Shape) -> bool:
        """Return whether a step neither takes too long, nor surely longer than in another way, as shorter ones show."""
        known = [(each.tokens, seconds) for each, seconds in self._seconds[name].items() if each.kind == "prompt"]
        shorter = sorted(each for each in known if each[0] < shape.tokens)[-2:]
        if shape.kind == "decode" or not shorter:
            return True
        tokens, seconds = shorter[-1]
        if seconds / tokens * shape.tokens > MAX_STEP_SECONDS:
            return False
        if len(shorter) < 2:
            return True
        # Beyond two known prompts on the line through them: short ones alone say little about a token of a long one.
        token_seconds = (seconds - shorter[0][1]) / (tokens - shorter[0][0])
        return seconds + token_seconds * (shape.tokens - tokens) < CONTENDER * self._best(shape)

    def _is_contender(self, name: str, shapes: Sequence[Shape]) -> bool:
        return any(self._seconds[name][shape] < CONTENDER * self._best(shape) for shape in shapes)

    def _best(self, shape: Shape) -> float:
        return min((times.get(shape, math.inf) for times in self._seconds.values()), default=math.inf)


def _plausible(times: Mapping[Shape, float]) -> dict[Shape, float]:
    """Return times of which none is above that of a larger step: such a one was disturbed."""
    return {
        shape: min(times[other] for other in times if other.kind == shape.kind and other.tokens >= shape.tokens)
        for shape in times
    }


def _install(_sample: ModelRunner, way: OptionalExecutor) -> None:
    way.install()


def step_seconds(sample: ModelRunner, way: Executor, shape: Shape) -> float:
    """Compute one step and return how long it took, on the device as well."""
    cache, vocab_size = sample.cache, sample.model.get_input_embeddings().num_embeddings
    ids = [token % vocab_size for token in range(shape.tokens)]
    if shape.kind == "decode":
        start = min(KEYS, cache.length - 1)
        segments = [Segment(row, start, [token]) for row, token in enumerate(ids)]
    else:
        segments = [Segment(0, 0, ids)]
    batch = cache.pack(segments, [True] * len(segments))
    _synchronize(cache.device)
    began = time.perf_counter()
    way.forward(batch)
    _synchronize(cache.device)
    return time.perf_counter() - began


def waited_seconds() -> float:
    """Return how long the threads of this process have waited for a processor; 0 where the system does not say."""
    waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may have ended meanwhile.
        with suppress(OSError):
            waited += int(path.read_text().split()[1])
    return waited / 1e9


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
