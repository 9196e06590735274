"""Steps of sampling that are recorded once and replayed, so that a GPU gets all of their kernels at once.

A recorded step reads the same memory each time: there is one for each method and each of a few numbers of rows, over
logits that all share and over settings that are written when rows come or go.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.worker.execution.base import ExecutorUnavailableError
from app.worker.sampling.sampling_step import Method, RowSettings, SlotStates, sample_step

ENTRIES = 1024
"""Biases, and tokens that may not come yet, that a recorded step can hold."""
MAX_ROWS = 256
"""More rows are sampled by launches: they take longer than launching them does, and memory for logits."""

Step = Callable[[], None]
Record = Callable[[Step], Step]
"""Makes of a step one that computes the same at each call, faster."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A recorded step whose settings are those of some rows, until others are written."""

    logits: Tensor
    """(rows, vocab) float32; this and the next one are in memory that all recorded steps share."""
    tokens: Tensor
    """(rows,) int64"""
    compute: Step

    def __call__(self, logits: Tensor) -> Tensor:
        """Sample from (rows, vocab) logits of any float type, which are not modified; return (rows,) int64."""
        self.logits.copy_(logits)
        self.compute()
        return self.tokens.clone()


class SamplingGraphs:
    """The recorded steps of all methods that rows usually have, and their memory."""

    def __init__(self, states: SlotStates, vocab_size: int, width: int) -> None:
        """Args: width: how many of the most likely tokens are sorted where any are."""
        self._states, self._width = states, width
        # What is allocated in a recorded step may be another's later.
        states.allocate_counts()
        most, device = min(MAX_ROWS, len(states.sampled)), states.sampled.device
        self._logits = torch.zeros((most, vocab_size), device=device)
        self._tokens = torch.zeros(most, dtype=torch.long, device=device)
        self._padding = RowSettings.padding(most, ENTRIES, vocab_size)
        kinds = ("greedy", 0), ("unsorted", 0), ("sorted", width)
        methods = [Method(kind, sort, penalised) for penalised in (False, True) for kind, sort in kinds]
        self._settings = {method: self._padding.to(device) for method in methods}
        self._rows = [1 << power for power in range((most - 1).bit_length())] + [most]
        self._steps: dict[tuple[Method, int], Step] = {}

    def record(self, record: Record) -> None:
        """Record all steps and compare each with the same one called; the states are empty again afterwards.

        Raises: ExecutorUnavailableError: their tokens differ.  Whatever `record` raises.
        """
        for rows in reversed(self._rows):
            for method in self._settings:
                self._steps[method, rows] = record(self._step(method, rows))
        for (method, rows), recorded in self._steps.items():
            self._write(self._trial(rows), self._settings[method].first(rows))
            expected, found = (self._tokens_of(each, rows) for each in (self._step(method, rows), recorded))
            if not torch.equal(expected, found):
                raise ExecutorUnavailableError(f"tokens of {rows} rows differ where they are {method.kind}")
        self._states.clear()

    def step(self, method: Method, settings: RowSettings) -> RecordedStep | None:
        """Return the recorded step of some rows, or None where they need one that is not recorded.

        Args: settings: of the rows, on the host; the last ones of this method are overwritten.
        """
        count = len(settings.rows)
        entries = max(len(settings.biased), len(settings.ends))
        if method not in self._settings or entries > ENTRIES or count > self._rows[-1]:
            return None
        rows = next(each for each in self._rows if each >= count)
        both = zip(settings.tensors, self._padding.first(rows).tensors, strict=True)
        padded = (torch.cat([own, padding[len(own) :]]) for own, padding in both)
        self._write(RowSettings(*padded), self._settings[method].first(rows))
        return RecordedStep(self._logits[:count], self._tokens[:count], self._steps[method, rows])

    def _step(self, method: Method, rows: int) -> Step:
        settings, states = self._settings[method].first(rows), self._states
        logits, tokens = self._logits[:rows], self._tokens[:rows]

        def compute() -> None:
            tokens.copy_(sample_step(logits, settings, states, method))

        return compute

    def _write(self, settings: RowSettings, target: RowSettings) -> None:
        for source, memory in zip(settings.tensors, target.tensors, strict=True):
            memory.copy_(source, non_blocking=True)

    def _tokens_of(self, step: Step, rows: int) -> Tensor:
        """Return the tokens of a step, from states that are empty and logits that are always the same."""
        self._states.clear()
        self._logits.normal_(0, 3, generator=torch.Generator(self._logits.device).manual_seed(rows))
        step()
        return self._tokens[:rows].clone()

    def _trial(self, rows: int) -> RowSettings:
        """Return settings of rows that differ, some with each setting."""
        settings = self._padding.first(rows)
        number, most = torch.arange(rows), min(5, self._width - 1)
        columns = [0.4 + number % 3, most * (number % 2), 1 - 0.2 * (number % 4), 0.02 * (number % 3)]
        columns += [1 + 0.1 * (number % 3), 0.5 * (number % 2), 0.2 * (number % 3)]
        return replace(
            settings,
            rows=torch.stack([number, 7919 * number, torch.ones_like(number)], dim=1),
            numbers=torch.stack([column.double() for column in columns], dim=1),
        )
