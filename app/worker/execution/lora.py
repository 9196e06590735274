"""Low-rank adapters (LoRA, Hu and others 2021) of single tokens of a batch, beside the model's own linear layers.

A linear layer computes `x W^T`; with an adapter, a token also gets `(x down^T) up`.  The tokens of one batch may have
different adapters or none.  Decides how their products share calls; the weights of the model are never changed, so that
a pass without adapters is the one that there was before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MAX_SHARED_TOKENS = 8
"""Single tokens of one adapter that share a product with those of other adapters, each of which is computed as often as
the one that has most; more are computed by themselves."""
MIN_RANK = 8
"""Adapters of this rank or less lie side by side as if all had this one."""
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that usually read the same input, so that one product can reduce it for all of them."""


class LoraWeights(NamedTuple):
    """The low-rank matrices of an adapter for one linear layer."""

    down: Tensor
    """(rank, inputs)"""
    up: Tensor
    """(rank, outputs)"""
    scale: float = 1.0
    """Factor of the product."""


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class LoraAdapter:
    """The weights of one adapter on the model's device, in its compute type or losslessly in 16 bits."""

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
class _Part:
    """Tokens of a batch that share a product: equally many of each of some neighbouring adapters of a stack."""

    adapters: slice
    tokens: slice | Tensor | None
    """One adapter's after the other's; one token may be there twice.  None is all, in their order."""
    each: int
    """Tokens of each adapter; -1 is whatever there is."""
    batch_size: int
    """Tokens of the whole batch, with the same exception."""

    @property
    def count(self) -> int:
        """Adapters in this part."""
        return int(self.adapters.stop - self.adapters.start)

    def rows_of(self, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Return the part's rows of (..., size), as (adapters, tokens, size): a view, or a copy of scattered ones.

        Raises: RuntimeError: `x` does not have one row for each token of the batch.
        """
        if self.tokens is None:
            return x.view(shape)
        rows = x.view(self.batch_size, shape[2])
        chosen = rows[self.tokens] if isinstance(self.tokens, slice) else rows.index_select(0, self.tokens)
        return chosen.view(shape)


class _Reduction:
    """The first half of what adapters add to layers that may read the same input, for one part of the batch."""

    def __init__(self, down: Tensor, ranks: list[int], part: _Part) -> None:
        """Args: down: (adapters, ranks of all these layers, inputs)"""
        self._down = down.mT
        self._ranks = ranks
        self._part = part
        self._shape = part.count, part.each, down.shape[2]
        self._buffer = down.new_empty((part.count, part.each, sum(ranks))) if part.each >= 0 else None
        self._reduced: Sequence[Tensor] = () if self._buffer is None else torch.split(self._buffer, ranks, -1)
        self._input: Tensor | None = None

    def reduce(self, x: Tensor) -> Sequence[Tensor]:
        """Return `x down^T` of each layer, (adapters, tokens, rank), computed once for all that read `x`."""
        if self._input is not x:
            rows = self._part.rows_of(x if x.is_contiguous() else x.contiguous(), self._shape).to(self._down.dtype)
            if self._buffer is None:
                self._reduced = torch.split(torch.bmm(rows, self._down), self._ranks, -1)
            else:
                torch.bmm(rows, self._down, out=self._buffer)
            self._input = x
        return self._reduced

    def forget_input(self) -> None:
        """Compute the next input even if it is the last one's memory."""
        self._input = None


class _Addition:
    """The product of the low-rank matrices that a linear layer adds for one part of the batch."""

    def __init__(self, reduction: _Reduction, index: int, up: Tensor, part: _Part) -> None:
        """Args:
        index: which of the reduction's layers it is.
        up: (adapters, rank, outputs)
        """
        self.reduction = reduction
        self._index = index
        self._up = up
        self._part = part
        self._shape = part.count, part.each, up.shape[2]

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Add what the adapters make of `x`, (..., inputs), to `out`, (..., outputs)."""
        reduced, rows = self.reduction.reduce(x)[self._index], self._part.rows_of(out, self._shape)
        if rows.dtype == self._up.dtype:
            rows.baddbmm_(reduced, self._up)
        else:
            rows.add_(torch.bmm(reduced, self._up))
        tokens = self._part.tokens
        if isinstance(tokens, Tensor):
            # A token that is there twice has the same sum twice.
            out.view(-1, out.shape[-1]).index_copy_(0, tokens, rows.flatten(0, 1))


class _StackedLayers(NamedTuple):
    """The matrices of several adapters for layers that may read the same input; zeros where an adapter has none."""

    paths: Sequence[str]
    ranks: list[int]
    down: Tensor
    """(adapters, ranks of all layers, inputs)"""
    ups: Sequence[Tensor]
    """For each layer: (adapters, rank, outputs)."""


class LoraStack:
    """Adapters of about one rank, whose weights lie side by side so that one product serves single tokens of them all.

    On a CPU the weights are float32: products of a few tokens in 16 bits take longer than reading twice the bytes.
    """

    def __init__(self, adapters: Sequence[LoraAdapter]) -> None:
        self.index = {adapter: number for number, adapter in enumerate(adapters)}
        paths: dict[tuple[str, int], dict[str, None]] = {}
        for adapter in adapters:
            for path, weights in adapter.layers.items():
                paths.setdefault((_input_of(path), weights.down.shape[1]), {})[path] = None
        self.groups = [self._stacked(list(group)) for group in paths.values()]

    def parts(self, spans: Sequence[AdapterSpan], batch_size: int) -> list[_Part]:
        """Divide the tokens of spans, which all have an adapter of this stack, into products."""
        parts: list[_Part] = []
        singles: dict[int, list[int]] = {}
        for begin, end, adapter in spans:
            index = self.index[adapter]
            if end - begin == 1:
                singles.setdefault(index, []).append(begin)
            else:
                tokens = None if end - begin == batch_size else slice(begin, end)
                parts.append(_Part(slice(index, index + 1), tokens, end - begin, batch_size))
        for run in _runs(singles):
            most = max(len(singles[index]) for index in run)
            # Whoever has fewer repeats its first.
            chosen = [token for index in run for token in (singles[index] + singles[index][:1] * most)[:most]]
            parts.append(_Part(slice(run[0], run[-1] + 1), self._selection(chosen, batch_size), most, batch_size))
        return parts

    def additions(self, part: _Part) -> Iterator[tuple[str, _Addition]]:
        """Return what each linear layer adds for a part of the batch."""
        for paths, ranks, down, ups in self.groups:
            reduction = _Reduction(down[part.adapters], ranks, part)
            for index, (path, up) in enumerate(zip(paths, ups, strict=True)):
                yield path, _Addition(reduction, index, up[part.adapters], part)

    def _selection(self, tokens: list[int], batch_size: int) -> slice | Tensor | None:
        begin, end = tokens[0], tokens[-1] + 1
        if tokens == [*range(begin, end)]:
            return None if len(tokens) == batch_size else slice(begin, end)
        device = self.groups[0].down.device
        return torch.tensor(tokens, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def _stacked(self, paths: Sequence[str]) -> _StackedLayers:
        each = [[adapter.layers.get(path) for adapter in self.index] for path in paths]
        present = [[weights for weights in layer if weights is not None] for layer in each]
        ranks = [max(len(weights.down) for weights in layer) for layer in present]
        like = present[0][0].down
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        down = like.new_zeros((len(self.index), sum(ranks), like.shape[1]), dtype=dtype)
        ups = [
            down.new_zeros((len(down), rank, len(layer[0].up.T))) for rank, layer in zip(ranks, present, strict=True)
        ]
        for layer, up, part in zip(each, ups, torch.split(down, ranks, 1), strict=True):
            for number, weights in enumerate(layer):
                if weights is not None:
                    part[number, : len(weights.down)] = weights.down
                    up[number, : len(weights.up)] = weights.up.float() * weights.scale
        return _StackedLayers(paths, ranks, down, ups)


class LoraLayers:
    """Lets the linear layers of a torch model add what adapters do, for the duration of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stacks: dict[int, LoraStack] = {}
        """By the rank that their adapters have at most."""
        self._spans: Sequence[AdapterSpan] = ()
        self._tokens: int | None = None
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        """For the last spans: linear layers, and what they compute with adapters."""
        self._reductions: set[_Reduction] = set()

    @contextmanager
    def applied(self, spans: Sequence[AdapterSpan], tokens: int | None = None) -> Iterator[None]:
        """Apply adapters to the tokens that have one.

        Args: tokens: of the forward pass within; None lets every token of any pass have the one adapter of `spans`.
        """
        if spans and (spans != self._spans or tokens != self._tokens):
            self._prepare(spans, tokens)
        forwards = self._forwards if spans else []
        try:
            # A forward hook would do the same, and takes three times as long.
            for module, forward in forwards:
                vars(module)["forward"] = forward
            yield
        finally:
            for module, _ in forwards:
                vars(module).pop("forward", None)
            for reduction in self._reductions if spans else ():
                reduction.forget_input()

    def forget(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._stacks = {rank: stack for rank, stack in self._stacks.items() if adapter not in stack.index}
        self._clear()

    def _prepare(self, spans: Sequence[AdapterSpan], tokens: int | None) -> None:
        """Find out what each linear layer has to do, which stays the same while the same sequences decode."""
        self._clear()
        by_rank: dict[int, list[AdapterSpan]] = {}
        for span in spans:
            by_rank.setdefault(_rounded_rank(span.adapter), []).append(span)
        additions: dict[str, list[_Addition]] = {}
        for rank, own in by_rank.items():
            stack = self._stack_of(rank, {span.adapter for span in own})
            every = slice(stack.index[own[0].adapter], stack.index[own[0].adapter] + 1)
            for part in [_Part(every, None, -1, -1)] if tokens is None else stack.parts(own, tokens):
                for path, addition in stack.additions(part):
                    additions.setdefault(path, []).append(addition)
        for path, each in additions.items():
            module = self._model.get_submodule(path)
            self._forwards.append((module, _adapted(module.forward, each)))
            self._reductions.update(addition.reduction for addition in each)
        self._spans, self._tokens = list(spans), tokens

    def _clear(self) -> None:
        self._spans, self._tokens, self._forwards, self._reductions = (), None, [], set()

    def _stack_of(self, rank: int, wanted: set[LoraAdapter]) -> LoraStack:
        """Return a stack of these adapters: the last one, unless it is much larger than need be."""
        last = self._stacks.get(rank)
        if last is None or not (wanted <= last.index.keys() and len(last.index) <= 2 * len(wanted)):
            # Before the next takes memory.
            self._stacks.pop(rank, None)
            last = self._stacks[rank] = LoraStack(sorted(wanted, key=lambda adapter: adapter.digest))
        return last


def _adapted(forward: Callable[..., Tensor], additions: Sequence[_Addition]) -> Callable[..., Tensor]:
    """Return a linear layer's forward pass that adds what adapters do."""

    def adapted_forward(x: Tensor, *others: Any, **named: Any) -> Tensor:
        out = forward(x, *others, **named)
        for add in additions:
            add(x, out)
        return out

    return adapted_forward


def _input_of(path: str) -> str:
    """Return one name for all layers that may read the same input."""
    parent, _, name = path.rpartition(".")
    return next((f"{parent}.{'/'.join(names)}" for names in ONE_INPUT if name in names), path)


def _rounded_rank(adapter: LoraAdapter) -> int:
    """Return the next power of two."""
    return max(MIN_RANK, 1 << (adapter.rank - 1).bit_length())


def _runs(singles: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Return neighbouring adapters whose single tokens share a product."""
    runs: list[list[int]] = []
    shared = False
    for index in sorted(singles):
        few = len(singles[index]) <= MAX_SHARED_TOKENS
        if shared and few and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
        shared = few
    return runs
