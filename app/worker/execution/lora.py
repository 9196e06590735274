"""Low-rank adapters (LoRA, Hu and others 2021) of single tokens of a batch, beside the model's own linear layers.

A linear layer computes `x W^T`; with an adapter, a token also gets `(x down^T) up`.  The tokens of one batch may have
different adapters or none.  Decides how their products share calls; the weights of the model are never changed, so that
a pass without adapters is the one that there was before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MAX_SINGLES = 256
"""Tokens at the beginning of a batch that share one product over the ranks of all adapters."""


class LoraWeights(NamedTuple):
    """What an adapter adds to one linear layer."""

    down: Tensor
    """(rank, inputs)"""
    up: Tensor
    """(rank, outputs), scaled"""


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class LoraAdapter:
    """The weights of one adapter, in the model's compute type and on its device."""

    digest: str
    """Of everything that decides what it computes; the same weights under two names have one digest."""
    layers: Mapping[str, LoraWeights]
    """By the path of the linear layer in the model."""

    @property
    def rank(self) -> int:
        """The highest rank of its layers."""
        return max((len(weights.down) for weights in self.layers.values()), default=0)

    @property
    def parameters(self) -> int:
        """Numbers in all layers together."""
        return sum(weights.down.numel() + weights.up.numel() for weights in self.layers.values())


class AdapterSpan(NamedTuple):
    """Consecutive tokens of a batch that have one adapter."""

    begin: int
    end: int
    adapter: LoraAdapter


@dataclass(frozen=True, slots=True)
class _StackedLayer:
    """What several adapters add to one linear layer, side by side."""

    weights: LoraWeights
    """With the sum of the adapters' ranks in place of the rank."""
    ranks: tuple[range, ...]
    """Which of them are each adapter's; an empty range where it leaves this layer alone."""


class LoraStack:
    """Adapters whose weights lie side by side, so that one product serves the single tokens of all of them."""

    def __init__(self, adapters: Sequence[LoraAdapter]) -> None:
        self.adapters = tuple(adapters)
        self.index = {adapter: number for number, adapter in enumerate(self.adapters)}
        paths = dict.fromkeys(path for adapter in adapters for path in adapter.layers)
        self.layers = {path: self._stacked([adapter.layers.get(path) for adapter in adapters]) for path in paths}

    @property
    def rank(self) -> int:
        """The sum of the adapters' ranks."""
        return sum(adapter.rank for adapter in self.adapters)

    @staticmethod
    def _stacked(each: Sequence[LoraWeights | None]) -> _StackedLayer:
        ranks, end = list[range](), 0
        for weights in each:
            begin, end = end, end + (0 if weights is None else len(weights.down))
            ranks.append(range(begin, end))
        present = [weights for weights in each if weights is not None]
        if len(present) == 1:
            return _StackedLayer(present[0], tuple(ranks))
        down, up = zip(*present, strict=True)
        return _StackedLayer(LoraWeights(torch.cat(down), torch.cat(up)), tuple(ranks))


@dataclass(slots=True)
class _Pass:
    """Which tokens of one forward pass have which adapter of a stack."""

    tokens: int
    singles: list[int | None]
    """The adapters of the first tokens, each of which is its sequence's only one in this pass."""
    spans: list[tuple[int, int, int]]
    """Begin, end and adapter of the others that have one."""
    masks: dict[tuple[range, ...], Tensor] = field(default_factory=dict)
    """For the ranks of each kind of layer: which of the reduced values of `singles` belong to another adapter."""

    def add(self, layer: _StackedLayer, x: Tensor, out: Tensor) -> None:
        """Add what the adapters make of `x`, (..., inputs), to `out`, (..., outputs)."""
        down, up = layer.weights
        x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if len(x) != self.tokens:
            raise RuntimeError("a linear layer with an adapter does not compute every token")
        for begin, end, adapter in self.spans:
            ranks = layer.ranks[adapter]
            if ranks:
                own = slice(ranks.start, ranks.stop)
                out[begin:end].addmm_(x[begin:end] @ down[own].T, up[own])
        if count := len(self.singles):
            reduced = x[:count] @ down.T
            # Not multiplied by zero: what is infinite in another adapter would become NaN here.
            out[:count].addmm_(reduced.masked_fill_(self._foreign(layer, x.device), 0), up)

    def _foreign(self, layer: _StackedLayer, device: torch.device) -> Tensor:
        if layer.ranks not in self.masks:
            foreign = torch.ones(len(self.singles), len(layer.weights.down), dtype=torch.bool)
            for row, adapter in enumerate(self.singles):
                if adapter is not None:
                    foreign[row, list(layer.ranks[adapter])] = False
            self.masks[layer.ranks] = foreign.to(device, non_blocking=True)
        return self.masks[layer.ranks]


class LoraHooks:
    """Lets the linear layers of a torch model add what adapters do, for the duration of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stack = LoraStack(())

    @contextmanager
    def applied(self, spans: Sequence[AdapterSpan], tokens: int | None = None) -> Iterator[None]:
        """Apply adapters to the tokens that have one.

        Args: tokens: of the forward pass within; None lets every token of any pass have the one adapter of `spans`.
        """
        if not spans:
            yield
            return
        stack = self._stack_of({span.adapter for span in spans})
        add = self._add_to_all if tokens is None else _pass(spans, stack, tokens).add
        handles = list(self._register(stack, add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        if adapter in self._stack.index:
            self._stack = LoraStack(())

    def _stack_of(self, wanted: set[LoraAdapter]) -> LoraStack:
        """Return a stack of these adapters: the last one, unless it is much larger than need be."""
        last = self._stack
        if not (wanted <= last.index.keys() and last.rank <= 2 * sum(adapter.rank for adapter in wanted)):
            self._stack = LoraStack(sorted(wanted, key=lambda adapter: adapter.digest))
        return self._stack

    def _register(
        self, stack: LoraStack, add: Callable[[_StackedLayer, Tensor, Tensor], None]
    ) -> Iterable[RemovableHandle]:
        for path, layer in stack.layers.items():
            yield self._model.get_submodule(path).register_forward_hook(partial(_add_after, add, layer))

    @staticmethod
    def _add_to_all(layer: _StackedLayer, x: Tensor, out: Tensor) -> None:
        down, up = layer.weights
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down.T, up)


def _pass(spans: Sequence[AdapterSpan], stack: LoraStack, tokens: int) -> _Pass:
    """Divide the tokens: first those that are alone, then longer spans, each of which gets products of its own."""
    singles: list[int | None] = []
    longer: list[tuple[int, int, int]] = []
    for begin, end, adapter in spans:
        index = stack.index[adapter]
        # Tokens without an adapter in between take part, with nothing of any.
        if end - begin == 1 and not longer and begin < MAX_SINGLES:
            singles += [None] * (begin - len(singles)) + [index]
        else:
            longer.append((begin, end, index))
    return _Pass(tokens, singles, longer)


def _add_after(
    add: Callable[[_StackedLayer, Tensor, Tensor], None],
    layer: _StackedLayer,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Run behind a linear layer, in the signature of torch's forward hooks."""
    add(layer, inputs[0], output)
