"""Logit bias and penalties: change the logits of single tokens, a set of tokens for each row.

Pure arithmetic, in place, on (rows, vocab) float32 logits; a row with an empty set costs nothing, whatever the size of
the vocabulary.  Called by `sampler.py`, which decides whose logits change, and in which order.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from app.worker.sampling.sampling_ops import to_device

NO_TOKENS = torch.empty(0, dtype=torch.long)


class TokenCounts:
    """How often each token was sampled, in memory that tensors share: nothing is copied number by number."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}
        self._memory = np.zeros((2, 64), np.int64)
        """Tokens, and how often each was sampled."""

    def add(self, token: int) -> None:
        """Count one more of `token`."""
        index = self._index.setdefault(token, len(self._index))
        if index == self._memory.shape[1]:
            self._memory = np.concatenate([self._memory, np.zeros_like(self._memory)], axis=1)
        self._memory[0, index] = token
        self._memory[1, index] += 1

    def tokens(self) -> Tensor:
        """Return (distinct,) int64, each token once; valid until the next `add`."""
        return torch.from_numpy(self._memory[0, : len(self._index)])

    def counts(self) -> Tensor:
        """Return (distinct,) int64, in the order of `tokens` and valid as long."""
        return torch.from_numpy(self._memory[1, : len(self._index)])


def apply_logit_bias(logits: Tensor, ids: Sequence[Tensor], bias: Sequence[Tensor]) -> None:
    """Add each row's float32 `bias` to the logits of its tokens, which are distinct."""
    if any(map(len, ids)):
        rows, tokens = _coordinates(ids, logits.device)
        logits[rows, tokens] += torch.cat(list(bias)).to(logits.device, non_blocking=True)


def apply_repetition_penalty(logits: Tensor, seen_sets: Sequence[Sequence[Tensor]], penalties: Sequence[float]) -> None:
    """Divide positive logits of seen tokens by the row's penalty, and multiply negative ones.

    Args:
        seen_sets: seen tokens, one tensor for each row in each set; a token in several sets is penalised once.
        penalties: one for each row.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; negative logits as transformers does it.
    """
    coordinates = [_coordinates(ids, logits.device) for ids in seen_sets if any(map(len, ids))]
    if coordinates:
        rows, tokens = (torch.cat(each) for each in zip(*coordinates, strict=True))
        penalty = to_device(penalties, torch.float32, logits.device)[rows]
        # All logits are read before one is written: that is why a token may be there twice.
        seen = logits[rows, tokens]
        logits[rows, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)


def apply_presence_and_frequency(
    logits: Tensor, sampled: Sequence[TokenCounts | None], penalties: Sequence[tuple[float, float]]
) -> None:
    """Subtract presence + count * frequency from each sampled token's logit; `penalties` has that pair for each row."""
    ids = [NO_TOKENS if each is None else each.tokens() for each in sampled]
    if any(map(len, ids)):
        rows, tokens = _coordinates(ids, logits.device)
        counts = torch.cat([each.counts() for each in sampled if each is not None]).to(logits.device, non_blocking=True)
        presence, frequency = to_device(penalties, torch.float32, logits.device)[rows].unbind(dim=1)
        logits[rows, tokens] -= presence + counts * frequency


def mask_tokens(logits: Tensor, ids: Sequence[Tensor]) -> None:
    """Set the logits of each row's tokens to -inf."""
    if any(map(len, ids)):
        rows, tokens = _coordinates(ids, logits.device)
        logits[rows, tokens] = -torch.inf


def _coordinates(ids: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row indices and token ids, one of each for each token of each row."""
    rows = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in ids]))
    return rows.to(device, non_blocking=True), torch.cat(list(ids)).to(device, non_blocking=True)
