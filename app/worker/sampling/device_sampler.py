"""Sampling without the host: the next tokens of all rows in operators that wait for nothing and read nothing back.

For accelerators, where a step is launched before the tokens of the last one are read.  What changes from token to token
(how many a row has, which ones were sampled) is in tensors on the device, a row for each KV cache slot; what does not
is copied there when rows come or go.  The same arithmetic as `sampler.py`, so a request gets the same tokens from both.

The runner calls `sample` after it has launched a forward pass, and reads the result when it has launched the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.worker.sampling.sampler import (
    TOPK_WIDTHS,
    Sampled,
    SamplingFailure,
    SequenceSampler,
    pack_sampled,
    read_sampled,
    reported_rows,
)
from app.worker.sampling.sampling_graphs import Record, SamplingGraphs
from app.worker.sampling.sampling_ops import RowSet
from app.worker.sampling.sampling_step import Method, RowSettings, SampledRow, SlotStates, sample_step


class DeviceTokens:
    """The tokens of one step, on their way to the host."""

    def __init__(self, tokens: Tensor, packed: Tensor, samplers: Sequence[SequenceSampler], widths: list[int]) -> None:
        """Args:
        packed: what the host is to read, by `pack_sampled`.
        widths: how many tokens were sorted for each row.
        """
        self.tokens = tokens
        """(rows,) int64 on the device, for the next pass; 0 where none could be sampled."""
        self._samplers = samplers
        self._widths = widths
        self._packed = packed
        self._event: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._packed = torch.empty_like(packed, device="cpu", pin_memory=True).copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[Sampled | SamplingFailure | None]:
        """Wait for the step and return what was sampled; None where a row has to be sampled again, from more tokens."""
        if self._event is not None:
            self._event.synchronize()
        results = read_sampled(self._packed, self._samplers)
        for sampler, width, result in zip(self._samplers, self._widths, results, strict=True):
            if result is None:
                sampler.sorted_width = max(sampler.sorted_width, width + 1)
        return results


@dataclass(frozen=True, slots=True)
class _CalledStep:
    """A step of sampling whose operators are launched one by one."""

    settings: RowSettings
    states: SlotStates
    method: Method

    def __call__(self, logits: Tensor) -> Tensor:
        """Sample from (rows, vocab) logits of any float type, which are not modified; return (rows,) int64."""
        return sample_step(logits.to(torch.float32, copy=True), self.settings, self.states, self.method)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are sampled together."""

    rows: RowSet
    step: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is known of a batch as long as its rows stay the same."""

    samplers: Sequence[SequenceSampler]
    groups: list[_Group]
    place: RowSet
    """Where each row is among those of all groups."""
    reported: RowSet
    widths: list[int]
    """How many tokens are sorted for each row."""


class DeviceSampler:
    """The sampling state of all slots on one device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._widths = [*(width for width in TOPK_WIDTHS if width < vocab_size), vocab_size]
        self._states = SlotStates(slots, vocab_size, self._device)
        self._graphs: SamplingGraphs | None = None
        self._known: list[tuple[SequenceSampler, int] | None] = [None] * slots
        """Whose state a slot has, and after how many tokens; that of `_rows` is not in it."""
        self._rows: Sequence[SampledRow] = ()
        """Those of the last call, as they were when they were first sampled together."""
        self._steps = 0
        """How many tokens of each of them have been sampled since."""
        self._layout: tuple[list[tuple[int, SequenceSampler, int]], _Layout] | None = None

    @staticmethod
    def supports(sampler: SequenceSampler) -> bool:
        """Return whether a row's tokens can be sampled without the host: grammars and a model's rules cannot."""
        return sampler.grammar is None and not sampler.has_rules

    @torch.inference_mode()
    def record(self, record: Record) -> None:
        """Replay recorded steps from now on, where rows have usual settings; before any row is sampled.

        Raises: ExecutorUnavailableError: they sample other tokens.  Whatever `record` raises.
        """
        graphs = SamplingGraphs(self._states, self._vocab_size, self._widths[0])
        graphs.record(record)
        self._graphs = graphs

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampledRow]) -> DeviceTokens:
        """Sample the next token of each row, as `sampler.sample` does.

        Args:
            logits: (rows, vocab), any float type; not modified.
            rows: each of another slot.
        """
        for slot, sampler, sampled in self._rows:
            self._known[slot] = sampler, sampled + self._steps
        self._rows, self._steps = (), 0
        unknown = [row for row in rows if self._known[row.slot] != (row.sampler, row.sampled)]
        for row in rows:
            self._known[row.slot] = None
        self._states.take_over(unknown)
        return self._sample(logits, rows, self._layout_of(rows))

    @torch.inference_mode()
    def sample_next(self, logits: Tensor) -> DeviceTokens:
        """Sample one more token of each row of the last call, in the same order; that call must have succeeded.

        Nothing here is done row by row.
        """
        assert self._layout is not None  # noqa: S101  # the last call has made it
        rows, self._rows = self._rows, ()
        return self._sample(logits, rows, self._layout[1])

    def _sample(self, logits: Tensor, rows: Sequence[SampledRow], layout: _Layout) -> DeviceTokens:
        parts = [group.step(group.rows.gather(logits)) for group in layout.groups]
        if not parts:
            parts = [torch.zeros(0, dtype=torch.long, device=self._device)]
        tokens = layout.place.gather(parts[0] if len(parts) == 1 else torch.cat(parts))
        packed = pack_sampled(logits, tokens, layout.reported, layout.samplers)
        # Where anything fails, the state of the rows is unknown.
        self._rows, self._steps = rows, self._steps + 1
        return DeviceTokens(tokens.clamp_min(0), packed, layout.samplers, layout.widths)

    def _layout_of(self, rows: Sequence[SampledRow]) -> _Layout:
        """Return the layout of a batch, the last one if its rows are the same."""
        key = [(row.slot, row.sampler, row.sampler.sorted_width) for row in rows]
        if self._layout is None or self._layout[0] != key:
            self._layout = key, self._make_layout(rows)
        return self._layout[1]

    def _make_layout(self, rows: Sequence[SampledRow]) -> _Layout:
        groups: dict[Method, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self._method(row.sampler), []).append(index)
        order = [index for indices in groups.values() for index in indices]
        samplers = [row.sampler for row in rows]
        return _Layout(
            samplers=samplers,
            groups=[self._group(rows, indices, method) for method, indices in groups.items()],
            place=RowSet.of(sorted(range(len(rows)), key=order.__getitem__), len(rows), self._device),
            reported=RowSet.of(reported_rows(samplers), len(rows), self._device),
            widths=[self._width(sampler) for sampler in samplers],
        )

    def _method(self, sampler: SequenceSampler) -> Method:
        if sampler.params.temperature == 0:
            return Method("greedy", 0, sampler.has_penalty)
        if sampler.params.top_p == 1 and not sampler.top_k:
            return Method("unsorted", 0, sampler.has_penalty)
        return Method("sorted", self._width(sampler), sampler.has_penalty)

    def _width(self, sampler: SequenceSampler) -> int:
        """Return how many of a row's most likely tokens are sorted: as many as it may take, or has needed before."""
        least = min(max(sampler.sorted_width, sampler.top_k + 1), self._widths[-1])
        return next(width for width in self._widths if width >= least)

    def _group(self, rows: Sequence[SampledRow], indices: Sequence[int], method: Method) -> _Group:
        settings = RowSettings.of([rows[index] for index in indices], self._vocab_size)
        recorded = None if self._graphs is None else self._graphs.step(method, settings)
        step = recorded or _CalledStep(settings.to(self._device), self._states, method)
        return _Group(RowSet.of(indices, len(rows), self._device), step)
