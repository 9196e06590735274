"""What becomes of the hidden states of a text's tokens: pooled to one vector, projected, normalized, cut.

Each step computes what the module of the same name in sentence-transformers does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_Pool = Callable[[Tensor, Tensor], Tensor]
"""((texts, tokens, size), (texts, tokens)) to (texts, size); the weights are 0 for tokens that do not count."""

NO_TOKEN = 1e-9
"""Smallest sum of weights that is divided by."""


def _first(states: Tensor, weights: Tensor) -> Tensor:
    return _gather(states, weights.gt(0).int().argmax(dim=1))


def _last(states: Tensor, weights: Tensor) -> Tensor:
    places = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    return _gather(states, (weights.gt(0) * places).argmax(dim=1))


def _gather(states: Tensor, places: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), places]


def _greatest(states: Tensor, weights: Tensor) -> Tensor:
    return states.masked_fill(weights.unsqueeze(-1).eq(0), float("-inf")).amax(dim=1)


def _sum(states: Tensor, weights: Tensor) -> Tensor:
    return (states * weights.unsqueeze(-1)).sum(dim=1)


def _total(weights: Tensor) -> Tensor:
    return weights.sum(dim=1, keepdim=True).clamp(min=NO_TOKEN)


def _mean(states: Tensor, weights: Tensor) -> Tensor:
    return _sum(states, weights) / _total(weights)


def _mean_by_root(states: Tensor, weights: Tensor) -> Tensor:
    return _sum(states, weights) / _total(weights).sqrt()


def _mean_by_position(states: Tensor, weights: Tensor) -> Tensor:
    return _mean(states, weights * torch.arange(1, weights.shape[1] + 1, device=weights.device))


POOLING: Mapping[str, _Pool] = {
    "cls": _first,
    "max": _greatest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _mean_by_position,
    "lasttoken": _last,
}
"""Pooling by its name in sentence-transformers, in the order in which several are put one after the other."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer behind the pooling."""

    linear: nn.Linear
    activation: nn.Module
    residual: bool = False
    """Whether the input is added to the output, of the same size."""

    def __call__(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.activation(self.linear(vectors))
        return out + vectors if self.residual else out


def normalize(vectors: Tensor) -> Tensor:
    """Scale vectors to length 1; zeros stay zeros."""
    return functional.normalize(vectors, p=2, dim=-1)


@dataclass(frozen=True, slots=True)
class Head:
    """Everything behind the last hidden states."""

    pooling: tuple[str, ...] = ("mean",)
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Projections and normalizations, in their order."""

    @property
    def normalizes(self) -> bool:
        """Return whether its vectors have length 1."""
        return bool(self.steps) and self.steps[-1] is normalize

    def __call__(self, states: Tensor, mask: Tensor, dimensions: Sequence[int | None]) -> list[Tensor]:
        """Return the vector of each text, in float32 on the CPU.

        Args:
            states: (texts, tokens, size), the last hidden states.
            mask: (texts, tokens), true for tokens that are pooled.
            dimensions: for each text the length that its vector is cut to; one that was normalized is again.
        """
        weights = mask.to(torch.float32)
        vectors = torch.cat([POOLING[name](states.float(), weights) for name in self.pooling], dim=-1)
        for step in self.steps:
            vectors = step(vectors)
        return [self._cut(vector, length) for vector, length in zip(vectors.cpu(), dimensions, strict=True)]

    def _cut(self, vector: Tensor, length: int | None) -> Tensor:
        if length is None or length >= len(vector):
            return vector
        return normalize(vector[:length]) if self.normalizes else vector[:length]
