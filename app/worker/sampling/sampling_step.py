"""One step of sampling, for rows of one method, in operators that a graph can hold.

What is done depends only on the method and on shapes; everything else is in tensors: the settings of the rows, which
stay the same from step to step, and the state of the slots, which a step moves on.  Called by `device_sampler.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.worker.sampling.sampler import SequenceSampler
from app.worker.sampling.sampling_ops import (
    MIN_TEMPERATURE,
    DrawColumns,
    argmax_tokens,
    name_failures,
    sample_sorted,
    sample_unsorted,
    uniform_numbers,
)


class SampledRow(NamedTuple):
    """A row of logits, and whose it is."""

    slot: int
    """The request's KV cache slot: its state on the device is found by it."""
    sampler: SequenceSampler
    sampled: int
    """Tokens sampled for it so far, those that the host has not read included."""


class Method(NamedTuple):
    """The operators that sample a row, which depend on its own sampling parameters alone."""

    kind: str
    """`greedy`, `unsorted` or `sorted`."""
    width: int
    """How many of its most likely tokens are sorted; 0 unless any are."""
    penalised: bool
    """Whether the tokens that it has lower their logits."""


class SlotStates:
    """The sampling state that changes with every token, on the device, a row for each KV cache slot."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = slots, vocab_size
        self.sampled = torch.zeros(slots, dtype=torch.long, device=device)
        """(slots,) tokens of each row."""
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        """(slots, vocab), how often each token was sampled; (0, vocab) before somebody has penalties."""
        self.prompts = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        """(slots, vocab), whether a token is in a prompt that has a repetition penalty; (0, vocab) as long."""

    def allocate_counts(self) -> None:
        """Allocate what penalties need."""
        if not len(self.counts):
            self.counts, self.prompts = (each.new_zeros(self._shape) for each in (self.counts, self.prompts))

    def clear(self) -> None:
        """Forget the tokens of all rows."""
        for each in (self.sampled, self.counts, self.prompts):
            each.zero_()

    def take_over(self, rows: Sequence[SampledRow]) -> None:
        """Take the state of rows from the host, which must know all of their tokens."""
        if not rows:
            return
        device = self.sampled.device
        known = torch.tensor([(row.slot, row.sampled) for row in rows]).to(device, non_blocking=True)
        self.sampled.index_copy_(0, known[:, 0], known[:, 1])
        for slot, sampler, _ in rows:
            if sampler.has_penalty:
                self.allocate_counts()
                self.counts[slot] = 0
                self.prompts[slot] = False
                self.prompts[slot].index_fill_(0, sampler.prompt_ids.to(device), True)
                tokens, counts = (each.to(device) for each in (sampler.counts.tokens(), sampler.counts.counts()))
                self.counts[slot].index_copy_(0, tokens, counts.int())


@dataclass(frozen=True, slots=True)
class RowSettings:
    """The sampling parameters of some rows as tensors on the device."""

    rows: Tensor
    """(rows, 3) int64: slot, key of the random numbers, and the tokens that a step adds: 1, or 0 for padding."""
    numbers: Tensor
    """(rows, 7) float64: temperature, top_k, top_p, min_p; repetition, presence and frequency penalty."""
    biased: Tensor
    """(biases,) int64, where in the flattened logits something is added."""
    biases: Tensor
    """(biases,) float32, what."""
    ends: Tensor
    """(ends, 3) int64: where in the flattened logits a token is that would end a row; that row's slot, and how many
    tokens it must have before."""

    @classmethod
    def of(cls, rows: Sequence[SampledRow], vocab_size: int) -> "RowSettings":
        """Return the settings of rows, on the host."""
        samplers = [row.sampler for row in rows]
        biases = [
            (index * vocab_size + token, value)
            for index, sampler in enumerate(samplers)
            for token, value in sampler.logit_bias.items()
        ]
        ends = [
            (index * vocab_size + token, row.slot, row.sampler.params.min_tokens)
            for index, row in enumerate(rows)
            for token in row.sampler.early_end_ids
        ]
        return cls(
            rows=torch.tensor([(row.slot, row.sampler.random_key, 1) for row in rows]),
            numbers=torch.tensor([_numbers(sampler) for sampler in samplers], dtype=torch.float64),
            biased=torch.tensor([index for index, _ in biases], dtype=torch.long),
            biases=torch.tensor([value for _, value in biases], dtype=torch.float32),
            ends=torch.tensor(ends, dtype=torch.long).view(-1, 3),
        )

    @classmethod
    def padding(cls, rows: int, entries: int, vocab_size: int) -> "RowSettings":
        """Return settings of rows that stand for none, with as many biases and ends that change nothing."""
        # Each in another place: adding nothing to one again and again would take its time.
        places = torch.arange(entries) % vocab_size
        nothing = torch.zeros_like(places)
        return cls(
            rows=torch.tensor([(0, 0, 0)]).repeat(rows, 1),
            numbers=torch.tensor([(1, 0, 1, 0, 1, 0, 0)], dtype=torch.float64).repeat(rows, 1),
            biased=places,
            biases=nothing.float(),
            ends=torch.stack([places, nothing, nothing], dim=1),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.rows, self.numbers, self.biased, self.biases, self.ends

    def first(self, rows: int) -> "RowSettings":
        """Return the settings of the first rows, with all biases and ends."""
        return RowSettings(self.rows[:rows], self.numbers[:rows], self.biased, self.biases, self.ends)

    def to(self, device: torch.device) -> "RowSettings":
        """Copy them to a device without waiting for its queue."""
        return RowSettings(*(each.to(device, non_blocking=True, copy=True) for each in self.tensors))


def _numbers(sampler: SequenceSampler) -> tuple[float, ...]:
    params = sampler.params
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return max(params.temperature, MIN_TEMPERATURE), sampler.top_k, params.top_p, params.min_p, *penalties


def sample_step(logits: Tensor, settings: RowSettings, states: SlotStates, method: Method) -> Tensor:
    """Sample the next token of each row, and move the rows' states on.

    Args: logits: (rows, vocab) float32, contiguous; overwritten.
    Returns: (rows,) int64: tokens, or what stands for none.
    """
    slots, keys, steps = settings.rows.unbind(1)
    sampled, usable = states.sampled.index_select(0, slots), logits.amax(dim=-1).isfinite()
    numbers = settings.numbers.unsqueeze(-1)
    _change(logits, settings, states, numbers if method.penalised else None)
    if method.kind == "greedy":
        tokens = argmax_tokens(logits)
    else:
        temperature, top_k, top_p, min_p = numbers[:, :4].unbind(1)
        uniform = uniform_numbers(keys, sampled)[:, None]
        draws = DrawColumns(temperature, top_k, top_p, min_p, uniform, unlimited=None, has_min_p=True)
        unsorted = method.kind == "unsorted"
        tokens = sample_unsorted(logits, draws) if unsorted else sample_sorted(logits, draws, method.width)
    tokens = name_failures(tokens, usable)
    states.sampled.index_add_(0, slots, steps)
    if method.penalised:
        places = slots * logits.shape[1] + tokens.clamp_min(0)
        states.counts.view(-1).index_add_(0, places, steps.int())
    return tokens


def _change(logits: Tensor, settings: RowSettings, states: SlotStates, numbers: Tensor | None) -> None:
    """Apply bias, penalties and min_tokens.  Args: numbers: (rows, 7, 1); None where no row has penalties."""
    flat = logits.view(-1)
    flat.index_add_(0, settings.biased, settings.biases)
    if numbers is not None:
        repetition, presence, frequency = numbers[:, 4:].float().unbind(1)
        slots = settings.rows[:, 0]
        counts = states.counts.index_select(0, slots)
        sampled = counts > 0
        seen = states.prompts.index_select(0, slots) | sampled
        divided = torch.where(logits > 0, logits / repetition, logits * repetition)
        torch.where(seen, divided, logits, out=logits)
        torch.where(sampled, logits - (presence + counts * frequency), logits, out=logits)
    places, slots, least = settings.ends.unbind(1)
    early = states.sampled.index_select(0, slots) < least
    flat.index_add_(0, places, torch.zeros_like(places, dtype=torch.float32).masked_fill_(early, -torch.inf))
