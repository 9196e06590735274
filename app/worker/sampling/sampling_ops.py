"""Tensor operations that choose one token for each row of logits.

Pure arithmetic: no generators, no state, no transfer to the host.  Every operation treats each row by itself, so that a
row's token does not depend on its neighbours.  Called by `sampler.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NO_VALID_TOKEN, NEEDS_WIDER_TOPK, RULED_OUT = -1, -2, -3
"""Stand in place of a token: a row's logits allow none; it may take more tokens than were sorted; its parameters allow
none."""
BLOCK = 512
"""Weights that are summed among themselves before the sums are: one float32 sum over a vocabulary is too coarse."""
MIN_TEMPERATURE = 1e-30
"""Smallest temperature whose reciprocal is finite in float32."""


class SamplingDraw(NamedTuple):
    """The sampling parameters and the random number of one row's next token."""

    temperature: float
    """More than 0."""
    top_k: int
    """0 for all tokens, else less than the vocabulary holds."""
    top_p: float
    min_p: float
    uniform: float
    """Uniform in [0, 1); selects one of the allowed tokens by its cumulative probability."""


def to_device(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for its queue."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class RowSet:
    """Some rows of a batch, on its device."""

    count: int
    index: Tensor | None
    """(count,) int64; None for all rows in order, or none."""

    @classmethod
    def of(cls, rows: Sequence[int], total: int, device: torch.device) -> "RowSet":
        """Return these rows out of so many."""
        if not rows or list(rows) == list(range(total)):
            return cls(len(rows), None)
        return cls(len(rows), to_device(rows, torch.long, device))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of a tensor, or `tensor` itself where they are all of them."""
        return tensor if self.index is None else tensor.index_select(0, self.index)


def gather_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows, or `tensor` itself where they are all of them in order."""
    return RowSet.of(rows, tensor.shape[0], tensor.device).gather(tensor) if rows else tensor[:0]


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """The draws of a group of rows, on the device of their logits."""

    temperature: Tensor
    """This and the next ones are (rows, 1) float64."""
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    unlimited: RowSet | None
    """The rows without top_k; None where only the device knows which ones these are."""
    has_min_p: bool
    """Whether any row may have one."""

    @classmethod
    def of(cls, draws: Sequence[SamplingDraw], device: torch.device) -> "DrawColumns":
        """Copy draws to a device."""
        columns = to_device(draws, torch.float64, device)
        columns[:, 0].clamp_(min=MIN_TEMPERATURE)
        unlimited = RowSet.of([row for row, draw in enumerate(draws) if not draw.top_k], len(draws), device)
        temperature, top_k, top_p, min_p, uniform = columns.unsqueeze(-1).unbind(dim=1)
        has_min_p = any(draw.min_p for draw in draws)
        return cls(temperature, top_k, top_p, min_p, uniform, unlimited, has_min_p)


WEYL, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = (1 << 64) - 1


def uniform_number(key: int, counter: int) -> float:
    """Return the random number of a key and a counter, uniform in [0, 1).

    Args: key: signed, of 64 bits.
    Source: SplitMix64, Steele, Lea and Flood 2014, section 4.  Its state is a sum: any number can be had at once.
    """
    word = (key + (counter + 1) * WEYL) & WORD
    word = (word ^ (word >> 30)) * MIX_1 & WORD
    word = (word ^ (word >> 27)) * MIX_2 & WORD
    return ((word ^ (word >> 31)) >> 11) * 2.0**-53


def uniform_numbers(keys: Tensor, counters: Tensor) -> Tensor:
    """Return `uniform_number` of int64 keys and counters, in float64 on their device."""
    word = keys + (counters + 1) * _signed(WEYL)  # int64 wraps around, as the words of 64 bits do
    word = (word ^ _shifted(word, 30)) * _signed(MIX_1)
    word = (word ^ _shifted(word, 27)) * _signed(MIX_2)
    return _shifted(word ^ _shifted(word, 31), 11).double() * 2.0**-53


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift to the right; int64 would drag its sign along."""
    return (words >> bits) & (WORD >> bits)


def argmax_tokens(logits: Tensor) -> Tensor:
    """Return (rows,) the token with the highest logit, the lowest id of equal ones, or NO_VALID_TOKEN."""
    peak, tokens = logits.max(dim=-1)  # NaN counts as the highest
    return tokens.where(peak.isfinite(), NO_VALID_TOKEN)


def name_failures(tokens: Tensor, usable: Tensor) -> Tensor:
    """Say of rows without a token why they have none.

    Args:
        tokens: (rows,) sampled from what bias, penalties and masks made of the model's logits.
        usable: (rows,) bool, whether the highest of those is finite.
    """
    # NaN or +inf may have been where no token is allowed, but would be in the log-probabilities.
    tokens = tokens.where(tokens != NO_VALID_TOKEN, RULED_OUT)
    return tokens.where(usable, NO_VALID_TOKEN)


def sample_unsorted(logits: Tensor, draws: DrawColumns) -> Tensor:
    """Sample from the whole vocabulary in token order, or from the part of it that min_p leaves.

    Args:
        logits: (rows, vocab) float32.
    Returns: (rows,) token ids or NO_VALID_TOKEN.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    blocks = _blocked_weights(logits, peak, draws.temperature)
    if draws.has_min_p:
        blocks.masked_fill_(blocks < draws.min_p[:, :, None].float(), 0)
    cumulative = blocks.sum(dim=-1).double().cumsum(dim=-1)
    level = draws.uniform * cumulative[:, -1:]
    block = _first_above(cumulative, level, cumulative[:, -1:])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0)
    tokens = block * BLOCK + _first_above(inside, level - before, inside[:, -1:])
    return tokens.where(peak.isfinite(), NO_VALID_TOKEN)[:, 0]


def sample_sorted(logits: Tensor, draws: DrawColumns, width: int) -> Tensor:
    """Sample after top_k, then top_p of what that leaves, then min_p.

    Args:
        logits: (rows, vocab) float32.
        width: how many tokens are sorted, at most the vocabulary; each top_k is less.
    Returns: (rows,) token ids, NO_VALID_TOKEN, or NEEDS_WIDER_TOPK where the allowed set may reach beyond `width`.
    """
    values, tokens = _top_sorted(logits, width)
    peak, all_tokens = values[:, :1], width == logits.shape[1]
    weights = ((values.double() - peak) / draws.temperature).exp()
    cumulative = weights.cumsum(dim=-1)
    top_k = draws.top_k.long().where(draws.top_k > 0, width)
    total = cumulative.gather(1, top_k - 1)
    unlimited = draws.unlimited
    if unlimited is None and not all_tokens:
        total = _mass(logits, peak, draws.temperature).where(draws.top_k == 0, total)
    elif unlimited is not None and unlimited.count and not all_tokens:
        mass = _mass(*(unlimited.gather(each) for each in (logits, peak, draws.temperature)))
        total = mass if unlimited.index is None else total.index_copy_(0, unlimited.index, mass)

    nucleus = (cumulative < draws.top_p * total).sum(dim=-1, keepdim=True) + 1
    likely = ((weights >= draws.min_p) & (weights > 0)).sum(dim=-1, keepdim=True)
    last = torch.minimum(torch.minimum(nucleus, likely), top_k).clamp(1, width) - 1
    allowed = cumulative.gather(1, last)
    sampled = tokens.gather(1, _first_above(cumulative, draws.uniform * allowed, allowed))
    if not all_tokens:
        # Equals of the last candidate may have been left out, and one of them may have the lower id.
        sampled = sampled.where(values.gather(1, last) > values[:, -1:], NEEDS_WIDER_TOPK)
    return sampled.where(peak.isfinite(), NO_VALID_TOKEN)[:, 0]


def _blocked_weights(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """Return (rows, blocks, BLOCK) float32: probabilities relative to the most likely token's, padded with zeros."""
    rows, vocab = logits.shape
    blocks = logits.new_zeros(rows, -(-vocab // BLOCK), BLOCK)
    torch.sub(logits, peak, out=blocks.flatten(1)[:, :vocab]).div_(temperature.float()).exp_()
    return blocks


def _mass(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """Return (rows, 1) float64: the sum of all weights."""
    return _blocked_weights(logits, peak, temperature).sum(dim=-1).double().sum(dim=-1, keepdim=True)


def _top_sorted(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` highest logits and their tokens, the highest first, equal ones by token id."""
    if width == logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    tokens = logits.topk(width, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def _first_above(cumulative: Tensor, level: Tensor, bound: Tensor) -> Tensor:
    """Return (rows, 1) the first index whose running sum is above `level`; one that adds nothing is never the first.

    Rounding may lift a level to the sum of all that is allowed, hence `bound`.  NaN ends at some index that exists.
    """
    level = torch.minimum(level, torch.nextafter(bound, torch.zeros_like(bound)))
    return torch.searchsorted(cumulative, level, right=True).clamp_max(cumulative.shape[1] - 1)
