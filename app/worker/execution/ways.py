"""Choose the way of execution for each step: the one that was the fastest for such steps on this machine.

Pure but for the executor at the end: `way_timing.py` measures, `executor_selection.py` installs.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from torch import Tensor

from app.ipc.messages import Compiled
from app.types import StepTimes
from app.worker.execution.base import Executor, OptionalExecutor
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.packed_batch import PackedBatch

MIN_GAIN = 0.05
"""Share of the time that another way or another copy of the weights has to save: less is noise of the measurement."""
PROMPT_TOKENS = 256
ANSWER_TOKENS = 128
"""The request by which layouts are compared."""

Kind = Literal["decode", "prompt"]
"""decode: one token of each of several sequences; prompt: several tokens of one, or both kinds together."""


class Shape(NamedTuple):
    """The size of a step."""

    kind: Kind
    tokens: int


class Layout(NamedTuple):
    """A form of a model's weights, which all ways of execution that compute with it share."""

    name: str
    ways: Callable[[Any, KVCache], Mapping[str, OptionalExecutor]]
    """Returns its ways for a model and the KV cache that it has written to, by their names, the usual one first.  What
    they install together is installed once."""
    takes_weights: bool = False
    """Whether the model's own forward pass cannot run beside it."""
    packs: bool = True
    """Whether it takes memory for weights of its own, or uses the model's as they are."""


class TimeTable:
    """Measured seconds of a step in each way, for some shapes; those of other sizes are interpolated."""

    def __init__(self, seconds: Mapping[str, Mapping[Shape, float]]) -> None:
        """Args: seconds: by way, the usual one first; slow ways may lack long prompts, and all are empty unmeasured."""
        self.seconds = seconds
        self.shapes: Sequence[Shape] = sorted({shape for times in seconds.values() for shape in times})

    def without(self, way: str) -> "TimeTable":
        """Return the table of the other ways."""
        return TimeTable({name: times for name, times in self.seconds.items() if name != way})

    def fastest(self, ways: Collection[str], shape: Shape) -> str:
        """Return which of some ways computes steps of a shape: the usual one unless another is clearly faster."""
        usual = min(ways, key=self._cost)
        best = min(ways, key=lambda way: self._estimate(way, shape))
        clear = self._estimate(best, shape) < (1 - MIN_GAIN) * self._estimate(usual, shape)
        return best if clear else usual

    def used(self, ways: Collection[str]) -> list[str]:
        """Return the ways among some that are the fastest for anything; the one that is used most is the first."""
        usual = min(ways, key=self._cost)
        return list(dict.fromkeys([usual, *(self.fastest(ways, shape) for shape in self.shapes)]))

    def choose(self, layouts: Sequence[Collection[str]], copies: int) -> list[int]:
        """Return which layouts of weights are kept: one, or more where each saves enough time for its memory.

        Args:
            layouts: the ways of each.
            copies: how many may be kept.
        """
        chosen: tuple[int, ...] = ()
        usable = [index for index, ways in enumerate(layouts) if ways]
        for count in range(1, min(copies, len(usable)) + 1):
            best = min(combinations(usable, count), key=lambda each: self._cost_of(layouts, each))
            if chosen and self._cost_of(layouts, best) > (1 - MIN_GAIN) * self._cost_of(layouts, chosen):
                break
            chosen = best
        return list(chosen)

    def _cost_of(self, layouts: Sequence[Collection[str]], chosen: Iterable[int]) -> float:
        return self._cost(*(way for index in chosen for way in layouts[index]))

    def _cost(self, *ways: str) -> float:
        """Return what a request takes at each number of sequences, as a multiple of the best of all ways, on average.

        Each sequence's share of a decoding step, as often as an answer has tokens, and its prompt: so decoding weighs
        most for one sequence, and prompts weigh more the more there are.
        """
        rows = [shape.tokens for shape in self.shapes if shape.kind == "decode"]
        ratios = [self._request(ways, each) / self._request([*self.seconds], each) for each in rows]
        return sum(ratios) / len(ratios) if ratios else 1

    def _request(self, ways: Sequence[str], rows: int) -> float:
        step, prompt = (
            min(self._estimate(way, shape) for way in ways)
            for shape in (Shape("decode", rows), Shape("prompt", PROMPT_TOKENS))
        )
        return ANSWER_TOKENS * step / rows + prompt

    def _estimate(self, way: str, shape: Shape) -> float:
        """Return the seconds of a step: on the line between its neighbours in the table, or on that from zero on."""
        known = [(tokens, seconds) for (kind, tokens), seconds in self._sorted(way) if kind == shape.kind]
        if not known:
            return 0
        below = max((each for each in known if each[0] <= shape.tokens), default=known[0])
        above = min((each for each in known if each[0] >= shape.tokens), default=None)
        if above is None:
            return below[1] * shape.tokens / below[0]
        if above[0] == below[0]:
            return below[1]
        share = (shape.tokens - below[0]) / (above[0] - below[0])
        return below[1] + max(0, share) * (above[1] - below[1])

    def _sorted(self, way: str) -> Iterator[tuple[Shape, float]]:
        return ((shape, self.seconds[way][shape]) for shape in self.shapes if shape in self.seconds[way])

    def describe(self, ways: Collection[str]) -> tuple[StepTimes, ...]:
        """Return the table with the way that is taken for each shape, for people."""
        return tuple(
            StepTimes(
                kind=shape.kind,
                tokens=shape.tokens,
                way=self.fastest(ways, shape),
                milliseconds={
                    name: round(1000 * times[shape], 3) for name, times in self.seconds.items() if shape in times
                },
            )
            for shape in self.shapes
        )


class MeasuredExecutor:
    """Computes each batch in the way that was the fastest for batches of its shape."""

    def __init__(self, ways: Mapping[str, Executor], table: TimeTable) -> None:
        """Args: ways: installed, the one that is used most first."""
        self.ways = ways
        self._table = table
        self._chosen: dict[Shape, Executor] = {}

    @property
    def compiled(self) -> Compiled | None:
        """Parts of the pass that were compiled for this machine, in the way that is used most."""
        return next(iter(self.ways.values())).compiled

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        # Linear layers, where nearly all of the time goes, see the tokens of a mixed batch as one matrix, whoever they
        # belong to: it counts as a prompt of so many tokens.
        decodes = len(batch.segments) == batch.size
        shape = Shape("decode" if decodes else "prompt", batch.size)
        if shape not in self._chosen:
            self._chosen[shape] = self.ways[self._table.fastest(self.ways, shape)]
        return self._chosen[shape].forward(batch)

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        for way in self.ways.values():
            way.forget_adapter(adapter)
