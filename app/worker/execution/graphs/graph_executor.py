"""Decoding in passes of fixed shapes, captured as CUDA graphs where there is a GPU.

A pass of few tokens is hundreds of kernels, which a GPU computes faster than Python can launch them.  Captured once,
all of them are launched at once.  A captured pass always has the same shape and reads the same memory: there is one for
each of a few numbers of rows and of keys, over tensors that the tokens of a step are copied into.  Whatever is not one
token without an adapter (prompts, guesses, adapters) is left to another executor, in the same step.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from app.ipc.messages import Compiled
from app.worker.execution.base import Executor, ExecutorUnavailableError
from app.worker.execution.graphs.decode_attention import PassAttention, masked_attention
from app.worker.execution.kv_cache import KVCache
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.packed_batch import PackedBatch, Segment, StaticBatch

log = logging.getLogger(__name__)

MIN_KEYS = 256
"""Keys that every row has room for in a pass; each larger number is twice the one before."""
MAX_ROW_ERROR = 0.5
"""How far the logits of one row may be off, as a share of their norm; those of another row are farther."""
TRIAL_IDS = 16
"""Tokens that every vocabulary has."""
TRIAL_SLOTS = 64
"""Prompts that are computed at once for the comparison."""

Pass = Callable[[], None]
"""Computes the logits of whatever its static batch holds, into memory of the executor."""
Record = Callable[[Pass], Pass]
"""Makes of a pass one that computes the same at each call, faster."""
Verify = Callable[[Tensor, Tensor], None]
"""Compares logits with the expected ones; raises ExecutorUnavailableError where they differ."""


@dataclass(slots=True)
class _Decoding:
    """Sequences that were decoded in one pass, and may be again."""

    batch: StaticBatch
    compute: Pass
    rows: int
    left: int
    """Tokens that each can be advanced by before one of them needs more keys than it has."""


class GraphExecutor:
    """Computes tokens that are decoded by recorded passes, and everything else by another executor."""

    def __init__(
        self,
        inner: Executor,
        cache: KVCache,
        record: Record,
        verify: Verify,
        *,
        pass_keys: int = 0,
        min_keys: int = MIN_KEYS,
        by_length: Mapping[int, PassAttention] | None = None,
    ) -> None:
        """Args:
        cache: has been written by a forward pass of the model.
        pass_keys: a pass takes as long as reading so many keys, attention apart.
        by_length: attention that reads what each token sees and no more, for some numbers of rows: one pass for all
            lengths.  Masked attention computes the others.
        """
        self._inner = inner
        self._cache = cache
        self._record = record
        self._verify = verify
        self._pass_keys = pass_keys
        self._by_length = by_length or {}
        self._rows = powers_of_two(1, cache.slots)
        masked = powers_of_two(min_keys, cache.length)
        self._keys = {rows: [cache.length] if rows in self._by_length else masked for rows in self._rows}
        """The numbers of keys that passes of so many rows are recorded for."""
        self._passes: dict[tuple[int, int], tuple[StaticBatch, Pass]] = {}
        self._logits = torch.empty(0)
        """(slots, vocab) of the last pass."""
        self._decoding: _Decoding | None = None
        """Those of the last batch, if there was nothing else in it."""

    @property
    def compiled(self) -> Compiled | None:
        """Return what is compiled of the model."""
        return self._inner.compiled or "graphs"

    @torch.inference_mode()
    def install(self) -> None:
        """Record all passes and compare each with the other executor; overwrites the KV cache.

        Raises: ExecutorUnavailableError: their logits differ, or they cannot be recorded.
        """
        began = time.perf_counter()
        probe = self._inner.forward(self._cache.pack([Segment(0, 0, [0])], [True]))
        self._logits = probe.new_empty((self._cache.slots, probe.shape[1]))
        for rows in reversed(self._rows):
            batch = StaticBatch(rows, probe.device)
            for keys in reversed(self._keys[rows]):
                self._passes[rows, keys] = batch, self._record(self._pass(batch, keys))
        self._verify_passes()
        log.info("%d passes were recorded in %.1f s", len(self._passes), time.perf_counter() - began)

    def uninstall(self) -> None:
        """Drop the passes, and whatever they wrote to the KV cache."""
        self._decoding = None
        self._passes.clear()
        self._logits = torch.empty(0)
        for slot in range(self._cache.slots):
            self._cache.clear_slot(slot)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Compute a batch and return the logits of the wanted tokens, (wanted, vocab)."""
        self._decoding = None
        others, plain = list[int](), list[int]()
        for index, segment in enumerate(batch.segments):
            (plain if len(segment.token_ids) == 1 and segment.adapter is None else others).append(index)
        groups = self._groups(plain, batch) if plain else []
        if not groups:
            return self._inner.forward(batch)
        if not others and len(groups) == 1:
            logits = self._decode(batch)
            self._decoding = self._continued(batch)
            return logits
        parts = []
        for part in [others, *groups] if others else groups:
            own = self._cache.pack([batch.segments[index] for index in part], [batch.wanted[index] for index in part])
            parts.append(self._inner.forward(own) if part is others else self._decode(own))
        return _in_order(torch.cat(parts), [*others, *(index for group in groups for index in group)], batch.wanted)

    def forward_next(self, tokens: Tensor) -> Tensor | None:
        """Compute one more token of each sequence of the last batch, if one pass has decoded them all and does again.

        Args: tokens: (rows,) int64 on the device.
        Returns: their logits, (rows, vocab), until the next pass.
        """
        decoding, self._decoding = self._decoding, None
        if decoding is None or not decoding.left:
            return None
        decoding.batch.advance(tokens)
        decoding.compute()
        decoding.left -= 1
        self._decoding = decoding
        return self._logits[: decoding.rows]

    def forget_adapter(self, adapter: LoraAdapter) -> None:
        """Let go of an adapter's weights."""
        self._inner.forget_adapter(adapter)

    def _pass(self, batch: StaticBatch, keys: int) -> Pass:
        attention = self._by_length.get(batch.size) or masked_attention(batch.size, keys, self._cache.slots)

        def compute() -> None:
            with self._cache.reading(batch, attention), attention.one_pass():
                self._logits[: batch.size].copy_(self._inner.forward(batch))

        return compute

    def _pass_of(self, batch: PackedBatch) -> tuple[StaticBatch, Pass]:
        rows = _at_least(self._rows, len(batch.segments))
        return self._passes[rows, _at_least(self._keys[rows], max(segment.end for segment in batch.segments))]

    def _continued(self, batch: PackedBatch) -> _Decoding | None:
        """Return a batch that one pass has decoded as what can go on; None where not all of its logits are known."""
        if not all(batch.wanted):
            return None
        ends = [segment.end for segment in batch.segments]
        keys = self._keys[_at_least(self._rows, len(ends))]
        return _Decoding(*self._pass_of(batch), len(ends), left=min(_at_least(keys, end) - end for end in ends))

    def _decode(self, batch: PackedBatch) -> Tensor:
        """Compute one token of each segment."""
        static, compute = self._pass_of(batch)
        static.load(batch.segments)
        compute()
        # A copy: the next pass writes its logits to the same memory.
        if all(batch.wanted):
            return self._logits[: len(batch.segments)].clone()
        return self._logits.index_select(0, batch.logit_indices)

    def _groups(self, indices: Sequence[int], batch: PackedBatch) -> list[list[int]]:
        """Divide segments into those that share a pass, the longest first.

        Short ones have a pass of their own where reading as many keys as the longest has would take longer.
        """
        buckets = self._keys[_at_least(self._rows, len(indices))]
        keys = {index: _at_least(buckets, batch.segments[index].end) for index in indices}
        groups, left = list[list[int]](), list(indices)
        for shorter in sorted(set(keys.values()), reverse=True)[1:]:
            longer = [index for index in left if keys[index] > shorter]
            others = [index for index in left if keys[index] <= shorter]
            one_pass, *passes = (
                _at_least(self._rows, len(part)) * max(keys[index] for index in part) for part in (left, longer, others)
            )
            if one_pass > sum(passes) + self._pass_keys:
                groups.append(longer)
                left = others
        return [*groups, left]

    def _verify_passes(self) -> None:
        """Let each pass decode a token in all of its rows but one."""
        slots, most = range(self._cache.slots), self._cache.length - 1
        prompts = [
            Segment(slot, 0, [(5 * slot + 3 * place + 1) % TRIAL_IDS for place in range(min(2 + slot % 7, most))])
            for slot in slots
        ]
        for begin in range(0, len(prompts), TRIAL_SLOTS):
            some = prompts[begin : begin + TRIAL_SLOTS]
            self._inner.forward(self._cache.pack(some, [False] * len(some)))
        for rows in self._rows:
            # Other tokens than before them: that of padding alone may have no logits.
            decodes = [
                Segment(each.slot, each.end, [(each.slot + 7) % TRIAL_IDS]) for each in prompts[-max(1, rows - 1) :]
            ]
            batch = self._cache.pack(decodes, [True] * len(decodes))
            expected = self._inner.forward(batch).float()
            for keys in self._keys[rows]:
                static, compute = self._passes[rows, keys]
                static.load(decodes)
                compute()
                found = self._logits[: len(decodes)].float()
                self._verify(found, expected)
                worst = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
                if not worst <= MAX_ROW_ERROR:
                    raise ExecutorUnavailableError(f"its logits of one row differ by {worst:.0%}")


def _in_order(logits: Tensor, order: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Return the logits of segments that were computed in this order by the order of the batch."""
    ends = dict(zip(order, accumulate(wanted[index] for index in order), strict=True))
    rows = [row for index, count in enumerate(wanted) for row in range(ends[index] - count, ends[index])]
    if rows == list(range(len(rows))):
        return logits
    return logits.index_select(0, torch.tensor(rows).to(logits.device, non_blocking=True))


def powers_of_two(first: int, last: int) -> list[int]:
    """Return `first`, twice as much and so on, and `last`."""
    numbers = []
    while first < last:
        numbers.append(first)
        first *= 2
    return [*numbers, last]


def _at_least(numbers: Sequence[int], needed: int) -> int:
    return numbers[bisect_left(numbers, needed)]
