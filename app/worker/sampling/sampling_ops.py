"""Tensor operations that choose one token for each row of logits.

Pure arithmetic: no generators, no state, no transfer to the host.  Every operation treats each row by itself, so that a
row's token does not depend on its neighbours.  Called by `sampler.py`.
"""

from collections.abc import Sequence
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


def gather_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows, or `tensor` itself where they are all of them in order."""
    if list(rows) == list(range(tensor.shape[0])):
        return tensor
    return tensor.index_select(0, to_device(rows, torch.long, tensor.device))


def to_device(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for its queue."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def argmax_tokens(logits: Tensor) -> Tensor:
    """Return (rows,) the token with the highest logit, the lowest id of equal ones, or NO_VALID_TOKEN."""
    peak, tokens = logits.max(dim=-1)  # NaN counts as the highest
    return tokens.where(peak.isfinite(), NO_VALID_TOKEN)


def sample_unsorted(logits: Tensor, draws: Sequence[SamplingDraw]) -> Tensor:
    """Sample from the whole vocabulary in token order, or from the part of it that min_p leaves.

    Args:
        logits: (rows, vocab) float32.
    Returns: (rows,) token ids or NO_VALID_TOKEN.
    """
    temperature, _, _, min_p, uniform = _columns(draws, logits.device)
    peak = logits.amax(dim=-1, keepdim=True)
    blocks = _blocked_weights(logits, peak, temperature)
    if any(draw.min_p for draw in draws):
        blocks.masked_fill_(blocks < min_p[:, :, None].float(), 0)
    cumulative = blocks.sum(dim=-1).double().cumsum(dim=-1)
    level = uniform * cumulative[:, -1:]
    block = _first_above(cumulative, level, cumulative[:, -1:])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(dim=-1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0)
    tokens = block * BLOCK + _first_above(inside, level - before, inside[:, -1:])
    return tokens.where(peak.isfinite(), NO_VALID_TOKEN)[:, 0]


def sample_sorted(logits: Tensor, draws: Sequence[SamplingDraw], width: int) -> Tensor:
    """Sample after top_k, then top_p of what that leaves, then min_p.

    Args:
        logits: (rows, vocab) float32.
        width: how many tokens are sorted, at most the vocabulary; each top_k is less.
    Returns: (rows,) token ids, NO_VALID_TOKEN, or NEEDS_WIDER_TOPK where the allowed set may reach beyond `width`.
    """
    temperature, top_k, top_p, min_p, uniform = _columns(draws, logits.device)
    values, tokens = _top_sorted(logits, width)
    peak, all_tokens = values[:, :1], width == logits.shape[1]
    weights = ((values.double() - peak) / temperature).exp()
    cumulative = weights.cumsum(dim=-1)
    top_k = top_k.long().where(top_k > 0, width)
    total = cumulative.gather(1, top_k - 1)
    unlimited = [row for row, draw in enumerate(draws) if not draw.top_k]
    if unlimited and not all_tokens:
        mass = _mass(gather_rows(logits, unlimited), gather_rows(peak, unlimited), gather_rows(temperature, unlimited))
        total.index_copy_(0, to_device(unlimited, torch.long, logits.device), mass)

    nucleus = (cumulative < top_p * total).sum(dim=-1, keepdim=True) + 1
    likely = ((weights >= min_p) & (weights > 0)).sum(dim=-1, keepdim=True)
    last = torch.minimum(torch.minimum(nucleus, likely), top_k).clamp(1, width) - 1
    allowed = cumulative.gather(1, last)
    sampled = tokens.gather(1, _first_above(cumulative, uniform * allowed, allowed))
    if not all_tokens:
        # Equals of the last candidate may have been left out, and one of them may have the lower id.
        sampled = sampled.where(values.gather(1, last) > values[:, -1:], NEEDS_WIDER_TOPK)
    return sampled.where(peak.isfinite(), NO_VALID_TOKEN)[:, 0]


def _columns(draws: Sequence[SamplingDraw], device: torch.device) -> tuple[Tensor, ...]:
    """Return one (rows, 1) float64 tensor for each field."""
    columns = to_device(draws, torch.float64, device)
    columns[:, 0].clamp_(min=MIN_TEMPERATURE)
    return columns.unsqueeze(-1).unbind(dim=1)


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
