"""Sampling without the host: the next tokens of all rows in operators that wait for nothing and read nothing back.

For accelerators, where a step is launched before the tokens of the last one are read.  What changes from token to token
(how many a row has, which ones were sampled) is in tensors on the device, a row for each KV cache slot; what does not
is copied there when rows come or go.  The same arithmetic as `sampler.py`, so a request gets the same tokens from both.

The runner calls `sample` after it has launched a forward pass, and reads the result when it has launched the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from app.worker.sampling.sampling_ops import (
    DrawColumns,
    RowSet,
    argmax_tokens,
    name_failures,
    sample_sorted,
    sample_unsorted,
    to_device,
    uniform_numbers,
)


class SampledRow(NamedTuple):
    """A row of logits, and whose it is."""

    slot: int
    """The request's KV cache slot: its state on the device is found by it."""
    sampler: SequenceSampler
    sampled: int
    """Tokens sampled for it so far, those that the host has not read included."""


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


class _Penalties(NamedTuple):
    """What the tokens of a row do to its logits."""

    rows: Tensor
    """(penalised,) in their group."""
    slots: Tensor
    repetition: Tensor
    """This and the next ones are (penalised, 1) float32."""
    presence: Tensor
    frequency: Tensor


class _Changes(NamedTuple):
    """How the logits of a group are changed."""

    bias: tuple[Tensor, Tensor, Tensor] | None
    """Rows, tokens, and what is added to their logits."""
    penalties: _Penalties | None
    ends: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Rows, their slots, tokens that would end them, and how many tokens they must have before."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are sampled together."""

    method: str
    width: int
    rows: RowSet
    slots: Tensor
    changes: _Changes | None
    columns: DrawColumns | None
    """All but the random numbers; None for greedy rows."""
    keys: Tensor


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is known of a batch as long as its rows stay the same."""

    slots: Tensor
    groups: list[_Group]
    place: RowSet
    """Where each row is among those of all groups."""
    reported: RowSet
    penalised: RowSet
    """Rows whose tokens are counted."""
    penalised_slots: Tensor
    widths: list[int]
    """How many tokens are sorted for each row."""


class DeviceSampler:
    """The sampling state of all slots on one device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._shape = slots, vocab_size
        self._device = torch.device(device)
        self._widths = [*(width for width in TOPK_WIDTHS if width < vocab_size), vocab_size]
        self._known: list[tuple[SequenceSampler, int] | None] = [None] * slots
        """Whose state a slot has, and after how many tokens."""
        self._sampled = torch.zeros(slots, dtype=torch.long, device=self._device)
        """(slots,) tokens of each row."""
        self._counts: Tensor | None = None
        """(slots, vocab) int32, how often each token was sampled; there is none while nobody has penalties."""
        self._prompts: Tensor | None = None
        """(slots, vocab) bool, whether a token is in a prompt that has a repetition penalty."""
        self._layout: tuple[list[tuple[int, SequenceSampler, int]], _Layout] | None = None

    @staticmethod
    def supports(sampler: SequenceSampler) -> bool:
        """Return whether a row's tokens can be sampled without the host: grammars and a model's rules cannot."""
        return sampler.grammar is None and not sampler.has_rules

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampledRow]) -> DeviceTokens:
        """Sample the next token of each row, as `sampler.sample` does.

        Args:
            logits: (rows, vocab), any float type; not modified.
            rows: each of another slot.
        """
        samplers = [row.sampler for row in rows]
        unknown = [row for row in rows if self._known[row.slot] != (row.sampler, row.sampled)]
        for row in rows:
            self._known[row.slot] = None  # unless all goes well
        self._take_over(unknown)
        layout = self._layout_of(rows)
        parts = [self._choose(group.rows.gather(logits), group) for group in layout.groups]
        tokens = torch.cat(parts) if parts else layout.slots
        tokens = layout.place.gather(tokens)
        packed, known = pack_sampled(logits, tokens, layout.reported, samplers), tokens.clamp_min(0)
        self._sampled.index_add_(0, layout.slots, torch.ones_like(layout.slots))
        if layout.penalised.count and self._counts is not None:
            one = torch.ones((), dtype=self._counts.dtype, device=self._device)
            at = layout.penalised_slots, layout.penalised.gather(known)
            self._counts.index_put_(at, one, accumulate=True)
        for row in rows:
            self._known[row.slot] = row.sampler, row.sampled + 1
        return DeviceTokens(known, packed, samplers, layout.widths)

    def _take_over(self, rows: Sequence[SampledRow]) -> None:
        """Copy the state of rows to the device; the host must know all of their tokens."""
        if not rows:
            return
        slots = to_device([row.slot for row in rows], torch.long, self._device)
        self._sampled.index_copy_(0, slots, to_device([row.sampled for row in rows], torch.long, self._device))
        for slot, sampler, _ in rows:
            if not sampler.has_penalty:
                continue
            if self._counts is None or self._prompts is None:
                self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
                self._prompts = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._counts[slot] = 0
            self._prompts[slot] = False
            self._prompts[slot].index_fill_(0, sampler.prompt_ids.to(self._device), True)
            tokens, counts = (each.to(self._device) for each in (sampler.counts.tokens(), sampler.counts.counts()))
            self._counts[slot].index_copy_(0, tokens, counts.int())

    def _layout_of(self, rows: Sequence[SampledRow]) -> _Layout:
        """Return the layout of a batch, the last one if its rows are the same."""
        key = [(row.slot, row.sampler, row.sampler.sorted_width) for row in rows]
        if self._layout is None or self._layout[0] != key:
            self._layout = key, self._make_layout(rows)
        return self._layout[1]

    def _make_layout(self, rows: Sequence[SampledRow]) -> _Layout:
        groups: dict[tuple[str, int, bool], list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self._method(row.sampler), []).append(index)
        order = [index for indices in groups.values() for index in indices]
        penalised = [index for index, row in enumerate(rows) if row.sampler.has_penalty]
        reported = reported_rows([row.sampler for row in rows])
        return _Layout(
            slots=self._indices([row.slot for row in rows]),
            groups=[self._group(rows, indices, *method) for method, indices in groups.items()],
            place=RowSet.of(sorted(range(len(rows)), key=order.__getitem__), len(rows), self._device),
            reported=RowSet.of(reported, len(rows), self._device),
            penalised=RowSet.of(penalised, len(rows), self._device),
            penalised_slots=self._indices([rows[index].slot for index in penalised]),
            widths=[self._width(row.sampler) for row in rows],
        )

    def _method(self, sampler: SequenceSampler) -> tuple[str, int, bool]:
        changes = sampler.has_penalty or sampler.has_bias or len(sampler.end_ids) > 0
        if sampler.params.temperature == 0:
            return "greedy", 0, changes
        if sampler.params.top_p == 1 and not sampler.top_k:
            return "unsorted", 0, changes
        return "sorted", self._width(sampler), changes

    def _width(self, sampler: SequenceSampler) -> int:
        """Return how many of a row's most likely tokens are sorted: as many as it may take, or has needed before."""
        least = min(max(sampler.sorted_width, sampler.top_k + 1), self._widths[-1])
        return next(width for width in self._widths if width >= least)

    def _group(
        self, rows: Sequence[SampledRow], indices: Sequence[int], method: str, width: int, changes: bool
    ) -> _Group:
        own = [rows[index] for index in indices]
        return _Group(
            method=method,
            width=width,
            rows=RowSet.of(indices, len(rows), self._device),
            slots=self._indices([row.slot for row in own]),
            changes=self._changes(own) if changes else None,
            columns=None if method == "greedy" else self._columns([row.sampler for row in own]),
            keys=self._indices([row.sampler.random_key for row in own]),
        )

    def _columns(self, samplers: Sequence[SequenceSampler]) -> DrawColumns:
        return DrawColumns.of([sampler.draw() for sampler in samplers], self._device)

    def _changes(self, rows: Sequence[SampledRow]) -> _Changes:
        return _Changes(self._bias(rows), self._penalties(rows), self._ends(rows))

    def _bias(self, rows: Sequence[SampledRow]) -> tuple[Tensor, Tensor, Tensor] | None:
        biases = [row.sampler.bias for row in rows]
        if not any(len(tokens) for tokens, _ in biases):
            return None
        of = [index for index, (tokens, _) in enumerate(biases) for _ in range(len(tokens))]
        tokens, values = (torch.cat(each).to(self._device) for each in zip(*biases, strict=True))
        return self._indices(of), tokens, values

    def _penalties(self, rows: Sequence[SampledRow]) -> _Penalties | None:
        own = [index for index, row in enumerate(rows) if row.sampler.has_penalty]
        if not own:
            return None
        params = [rows[index].sampler.params for index in own]
        values = [(each.repetition_penalty, each.presence_penalty, each.frequency_penalty) for each in params]
        columns = to_device(values, torch.float32, self._device).unsqueeze(-1).unbind(dim=1)
        return _Penalties(self._indices(own), self._indices([rows[index].slot for index in own]), *columns)

    def _ends(self, rows: Sequence[SampledRow]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        ends = [row.sampler.end_ids for row in rows]
        if not any(map(len, ends)):
            return None
        columns = [
            (index, row.slot, row.sampler.params.min_tokens)
            for index, (row, tokens) in enumerate(zip(rows, ends, strict=True))
            for _ in range(len(tokens))
        ]
        of, slots, least = (self._indices(each) for each in zip(*columns, strict=True))
        return of, slots, torch.cat(ends).to(self._device), least

    def _indices(self, numbers: Sequence[int]) -> Tensor:
        return to_device(numbers, torch.long, self._device)

    def _choose(self, logits: Tensor, group: _Group) -> Tensor:
        """Return (rows,) int64: each row's token, or what stands for none."""
        if group.columns is None and group.changes is None:
            return argmax_tokens(logits)
        changed = logits.float() if group.changes is None else self._changed(logits, group.changes)
        if group.columns is None:
            return name_failures(argmax_tokens(changed), logits)
        uniform = uniform_numbers(group.keys, self._sampled.index_select(0, group.slots))
        draws = group.columns.with_numbers(uniform)
        if group.method == "unsorted":
            return name_failures(sample_unsorted(changed, draws), logits)
        return name_failures(sample_sorted(changed, draws, group.width), logits)

    def _changed(self, logits: Tensor, changes: _Changes) -> Tensor:
        """Return (rows, vocab) float32 logits after bias, penalties and min_tokens."""
        changed = logits.to(torch.float32, copy=True)
        if changes.bias is not None:
            rows, tokens, values = changes.bias
            changed[rows, tokens] += values
        if changes.penalties is not None:
            changed.index_copy_(0, changes.penalties.rows, self._penalised(changed, changes.penalties))
        if changes.ends is not None:
            rows, slots, tokens, least = changes.ends
            early = self._sampled.index_select(0, slots) < least
            changed[rows, tokens] = changed[rows, tokens].masked_fill(early, -torch.inf)
        return changed

    def _penalised(self, logits: Tensor, penalties: _Penalties) -> Tensor:
        """Return the logits of the rows that have penalties, in the order of `penalties`."""
        assert self._counts is not None  # noqa: S101  # `_take_over` has made them
        assert self._prompts is not None  # noqa: S101
        own, counts = logits.index_select(0, penalties.rows), self._counts.index_select(0, penalties.slots)
        sampled = counts > 0
        seen = self._prompts.index_select(0, penalties.slots) | sampled
        divided = torch.where(own > 0, own / penalties.repetition, own * penalties.repetition)
        own = torch.where(seen, divided, own)
        return torch.where(sampled, own - (penalties.presence + counts * penalties.frequency), own)
