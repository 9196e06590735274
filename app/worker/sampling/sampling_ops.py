"""Choose one token of each row from the scores of a model step.

Pure arithmetic on tensors: no generators, no memory, no transfer to the host.  Every operation treats each row by
itself, so that a row's token does not depend on its neighbours.  Called by `sampler.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

UNUSABLE, WIDE = -1, -2
"""Stand for a token where a row's scores allow none, and where it may take more tokens than were put in order."""
BLOCK = 512
"""Weights that are summed among themselves before the sums are: one float32 sum over a vocabulary is too coarse."""
MIN_TEMPERATURE = 1e-30
"""A division by less is one by 0 in float32."""


class Draw(NamedTuple):
    """How one row's token is drawn."""

    temperature: float
    """More than 0."""
    top_k: int
    """0 for all tokens, else less than the vocabulary holds."""
    top_p: float
    min_p: float
    uniform: float
    """In [0, 1): decides which of the tokens it is."""


def pick(rows: Tensor, places: Sequence[int]) -> Tensor:
    """Return these rows, or `rows` itself where they are all of them in order."""
    if list(places) == list(range(rows.shape[0])):
        return rows
    return rows.index_select(0, send(places, torch.long, rows.device))


def send(numbers: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bring numbers to a device without waiting for what it is doing."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def most_likely(scores: Tensor) -> Tensor:
    """Return (rows,) the highest score's token, the lowest id of equal ones, or UNUSABLE."""
    peak, tokens = scores.max(dim=-1)  # NaN counts as the highest
    return tokens.where(peak.isfinite(), UNUSABLE)


def draw_any(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw from the whole vocabulary, in its own order, or from the part of it that min_p leaves.

    Args:
        scores: (rows, vocab) float32.
    Returns: (rows,) token ids or UNUSABLE.
    """
    temperature, _, _, min_p, uniform = _columns(draws, scores.device)
    peak = scores.amax(dim=-1, keepdim=True)
    blocks = _weigh(scores, peak, temperature)
    if any(draw.min_p for draw in draws):
        blocks.masked_fill_(blocks < min_p[:, :, None].float(), 0)
    cumulative = blocks.sum(dim=-1).double().cumsum(dim=-1)
    level = uniform * cumulative[:, -1:]
    block = _first_above(cumulative, level, cumulative[:, -1:])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0)
    tokens = block * BLOCK + _first_above(inside, level - before, inside[:, -1:])
    return tokens.where(peak.isfinite(), UNUSABLE)[:, 0]


def draw_ranked(scores: Tensor, draws: Sequence[Draw], width: int) -> Tensor:
    """Draw from the first top_k tokens, of them from the smallest set of mass top_p, and of it from what min_p leaves.

    Args:
        scores: (rows, vocab) float32.
        width: how many tokens are put in order, at most the vocabulary; each top_k is less.
    Returns: (rows,) token ids, UNUSABLE, or WIDE where the set may reach beyond `width`.
    """
    temperature, top_k, top_p, min_p, uniform = _columns(draws, scores.device)
    values, tokens = _ordered(scores, width)
    peak, all_tokens = values[:, :1], width == scores.shape[1]
    weights = ((values.double() - peak) / temperature).exp()
    cumulative = weights.cumsum(dim=-1)
    top_k = top_k.long().where(top_k > 0, width)
    total = cumulative.gather(1, top_k - 1)
    unlimited = [place for place, draw in enumerate(draws) if not draw.top_k]
    if unlimited and not all_tokens:
        mass = _mass(pick(scores, unlimited), pick(peak, unlimited), pick(temperature, unlimited))
        total.index_copy_(0, send(unlimited, torch.long, scores.device), mass)

    nucleus = (cumulative < top_p * total).sum(dim=-1, keepdim=True) + 1
    likely = ((weights >= min_p) & (weights > 0)).sum(dim=-1, keepdim=True)
    last = torch.minimum(torch.minimum(nucleus, likely), top_k).clamp(1, width) - 1
    kept = cumulative.gather(1, last)
    found = tokens.gather(1, _first_above(cumulative, uniform * kept, kept))
    if not all_tokens:
        # Equals of the last candidate may have been left out, and one of them may have the lower id.
        found = found.where(values.gather(1, last) > values[:, -1:], WIDE)
    return found.where(peak.isfinite(), UNUSABLE)[:, 0]


def _columns(draws: Sequence[Draw], device: torch.device) -> tuple[Tensor, ...]:
    """One (rows, 1) float64 tensor for each field."""
    floored = [draw._replace(temperature=max(draw.temperature, MIN_TEMPERATURE)) for draw in draws]
    return send(floored, torch.float64, device).unsqueeze(-1).unbind(dim=1)


def _weigh(scores: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(rows, blocks, BLOCK) float32: each token's probability as a share of the most likely one's, then zeros."""
    rows, vocab = scores.shape
    blocks = scores.new_zeros(rows, -(-vocab // BLOCK), BLOCK)
    torch.sub(scores, peak, out=blocks.flatten(1)[:, :vocab]).div_(temperature.float()).exp_()
    return blocks


def _mass(scores: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(rows, 1) float64: the sum of all weights."""
    return _weigh(scores, peak, temperature).sum(dim=-1).double().sum(dim=-1, keepdim=True)


def _ordered(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest scores and their tokens, the highest first, equal ones by token id."""
    if width == scores.shape[1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    tokens = scores.topk(width, sorted=False).indices.sort(dim=-1).values
    values, order = scores.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def _first_above(cumulative: Tensor, level: Tensor, bound: Tensor) -> Tensor:
    """(rows, 1) the first place whose running sum is above `level`; one that adds nothing is never the first.

    Rounding may lift a level to the sum of all that may be drawn, hence `bound`.  NaN ends at some place that exists.
    """
    level = torch.minimum(level, torch.nextafter(bound, torch.zeros_like(bound)))
    return torch.searchsorted(cumulative, level, right=True).clamp_max(cumulative.shape[1] - 1)
