"""Change the scores of single tokens: a set of tokens for each row, whatever the size of the vocabulary.

Pure arithmetic, in place, on (rows, vocab) float32 scores; a row with an empty set costs nothing.  Called by
`sampler.py`, which decides whose scores change, and in which order.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from app.worker.sampling.sampling_ops import send

NO_TOKENS = torch.empty(0, dtype=torch.long)


class TokenCounts:
    """How often each token was made, in arrays that torch copies at once, not number by number."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._tokens = array("q")
        self._counts = array("q")

    def add(self, token: int) -> None:
        """Count one more of `token`."""
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._counts.append(0)
        self._counts[place] += 1

    def tokens(self) -> Tensor:
        """Return (distinct,) int64, each token once."""
        return _copy(self._tokens)

    def counts(self) -> Tensor:
        """Return (distinct,) int64, in the order of `tokens`."""
        return _copy(self._counts)


def _copy(numbers: "array[int]") -> Tensor:
    # An array cannot grow while a tensor looks into it, hence the clone.
    return torch.frombuffer(numbers, dtype=torch.long).clone() if numbers else NO_TOKENS


def add_bias(scores: Tensor, ids: Sequence[Tensor], bias: Sequence[Tensor]) -> None:
    """Add each row's float32 `bias` to the scores of its tokens, which are distinct."""
    at, tokens = _spread(ids, scores.device)
    if len(at):
        scores[at, tokens] += torch.cat(list(bias)).to(scores.device, non_blocking=True)


def penalise_repeats(scores: Tensor, sets: Sequence[Sequence[Tensor]], penalties: Sequence[float]) -> None:
    """Divide the scores of seen tokens by the row's penalty, and multiply those below 0.

    Args:
        sets: seen tokens, one tensor for each row in each; a token that is in several is penalised once.
        penalties: one for each row.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; below 0 as transformers does it.
    """
    spread = [_spread(ids, scores.device) for ids in sets]
    at, tokens = (torch.cat(parts) for parts in zip(*spread, strict=True))
    if len(at):
        penalty = send(penalties, torch.float32, scores.device)[at]
        # All scores are read before one is written: that is why a token may be there twice.
        seen = scores[at, tokens]
        scores[at, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)


def penalise_counts(
    scores: Tensor, made: Sequence[TokenCounts | None], penalties: Sequence[tuple[float, float]]
) -> None:
    """Take presence + count * frequency off the score of each token made; `penalties` has that pair for each row."""
    at, tokens = _spread([NO_TOKENS if counts is None else counts.tokens() for counts in made], scores.device)
    if len(at):
        counts = torch.cat([counts.counts() for counts in made if counts is not None]).to(
            scores.device, non_blocking=True
        )
        presence, frequency = send(penalties, torch.float32, scores.device)[at].unbind(dim=1)
        scores[at, tokens] -= presence + counts * frequency


def rule_out(scores: Tensor, ids: Sequence[Tensor]) -> None:
    """Let none of each row's tokens be drawn."""
    at, tokens = _spread(ids, scores.device)
    if len(at):
        scores[at, tokens] = -torch.inf


def _spread(ids: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row numbers and token ids, one of each for each token of each row."""
    at = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in ids]))
    return at.to(device, non_blocking=True), torch.cat(list(ids)).to(device, non_blocking=True)
