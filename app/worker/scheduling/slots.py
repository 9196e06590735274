"""The KV cache slots: which sequence has which, what earlier sequences left there, and what is copied between them.

Pure, like the scheduler that it serves: it names copies of keys and values, and the runner makes them.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, field

from app.worker.scheduling.prefix_tree import BLOCK_TOKENS, Owner, PrefixTree
from app.worker.scheduling.schedule import KVMove, PrefixCopy, PrefixRestore, PrefixSave, Sequence

SLOTS_AHEAD = 4
"""Slots whose tokens are in the prefix cache before they are needed: what many hold is there twice then, in place of
what no slot holds any more."""


@dataclass(slots=True)
class Slot:
    """A KV cache slot; what its last sequence left there stays usable as a prefix until the slot is needed, and goes to
    the prefix cache then."""

    index: int
    sequence: Sequence | None = None
    owner: Owner | None = None
    """Tenant and adapter of the tokens that are cached here."""
    cached_ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are still there after the sequence has left."""
    freed_at: int = 0
    """The step in which the sequence left; the slot that was freed first is reused first."""
    saved_ahead: bool = False
    """Whether the prefix cache has been given all of these tokens, or as many as it had blocks for."""

    def computed_prefix(self) -> tuple[list[int], int]:
        """Return token ids, and how many of them are computed here."""
        if self.sequence is None:
            return self.cached_ids, len(self.cached_ids)
        return self.sequence.token_ids, self.sequence.computed_tokens


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What of a sequence has been computed: in a slot, in blocks of the prefix cache, or nowhere."""

    count: int
    """Tokens."""
    slot: Slot | None = None
    blocks: tuple[int, ...] = ()


class Slots:
    """All slots of a KV cache, and the prefix cache behind them."""

    def __init__(self, count: int, *, prefix_reuse: bool, prefix_blocks: int) -> None:
        """Args:
        count: sequences that can be in the KV cache at once, >= 1.
        prefix_reuse: whether a sequence may start from what another of its tenant and adapter left or is computing.
        prefix_blocks: blocks of the prefix cache, for what slots that are needed again would lose.
        """
        self.count = count
        self._slots = [Slot(index) for index in range(count)]
        self._prefix_reuse = prefix_reuse
        self._prefixes = PrefixTree(prefix_blocks)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have slots, by slot."""
        return [slot.sequence for slot in self._slots if slot.sequence is not None]

    @property
    def free(self) -> int:
        """How many have no sequence."""
        return sum(slot.sequence is None for slot in self._slots)

    def longest_prefix(self, sequence: Sequence) -> CachedPrefix:
        """Return the longest prefix of a sequence that was computed for the same owner."""
        if not self._prefix_reuse:
            return CachedPrefix(0)
        found = CachedPrefix(0)
        for slot in self._slots:
            if slot.owner == sequence.cache_owner:
                token_ids, computed = slot.computed_prefix()
                # The last token is always computed: the next one is sampled from its logits.
                shared = min(common_prefix_length(token_ids, sequence.token_ids), computed, sequence.reusable_tokens)
                if shared > found.count:
                    found = CachedPrefix(shared, slot)
        count, blocks = self._prefixes.match(sequence.cache_owner, sequence.token_ids)
        count = min(count, sequence.reusable_tokens)
        if count <= found.count:
            return found
        return CachedPrefix(count, blocks=tuple(blocks[: math.ceil(count / BLOCK_TOKENS)]))

    def start(self, sequence: Sequence, prefix: CachedPrefix) -> Iterator[KVMove]:
        """Give a sequence a free slot with its cached prefix; yield the copies to be made first."""
        free = self._by_next_use()
        target, source = free[0], prefix.slot
        # A slot that would lose much more than it gives is copied from, as long as another can be had.
        if (
            source is not None
            and source.sequence is None
            and (len(source.cached_ids) <= 2 * prefix.count or len(free) == 1)
        ):
            target = source
        yield from self._save(target, prefix)
        if source is not None and target is not source:
            yield PrefixCopy(source.index, target.index, prefix.count)
        if prefix.blocks:
            yield PrefixRestore(prefix.blocks, target.index)
        target.sequence, target.owner, target.cached_ids = sequence, sequence.cache_owner, []
        sequence.slot, sequence.computed_tokens = target.index, prefix.count

    def release(self, sequence: Sequence, *, step: int, discard: bool = False) -> None:
        """Take a sequence's slot away.

        Args: discard: whether what it computed must not be reused.
        """
        slot = next(slot for slot in self._slots if slot.sequence is sequence)
        reusable = self._prefix_reuse and not discard
        slot.cached_ids = sequence.token_ids[: sequence.computed_tokens] if reusable else []
        slot.sequence, slot.freed_at, slot.saved_ahead, sequence.slot = None, step, False, None

    def save_ahead(self, max_blocks: int) -> PrefixSave | None:
        """Store in the prefix cache what the slots that are needed next will lose; to be called until it returns None.

        Each slot has one turn after its sequence has left: where there are too few blocks for all, they would take them
        from each other for ever.

        Args: max_blocks: how many are written at most.
        """
        slots = self._by_next_use()
        # One that holds nothing is used first.
        if not slots or not slots[0].cached_ids:
            return None
        for slot in slots[:SLOTS_AHEAD]:
            if not slot.saved_ahead and slot.owner is not None and len(slot.cached_ids) >= BLOCK_TOKENS:
                start, blocks = self._prefixes.insert(slot.owner, slot.cached_ids, max_blocks=max_blocks)
                end = start + len(blocks) * BLOCK_TOKENS
                slot.saved_ahead = len(blocks) < max_blocks or end >= len(slot.cached_ids)
                if blocks:
                    return PrefixSave(slot.index, start, tuple(blocks))
        return None

    def _by_next_use(self) -> list[Slot]:
        """Return the free slots, those that hold nothing first, then as they were freed."""
        free = [slot for slot in self._slots if slot.sequence is None]
        return sorted(free, key=lambda slot: (len(slot.cached_ids) > 0, slot.freed_at))

    def _save(self, slot: Slot, prefix: CachedPrefix) -> Iterator[KVMove]:
        """Store in the prefix cache what a slot is about to lose."""
        remaining = prefix.count if slot is prefix.slot else 0
        if slot.owner is None or len(slot.cached_ids) < remaining + BLOCK_TOKENS:
            return
        # The blocks of the prefix are read after these are written.
        start, blocks = self._prefixes.insert(slot.owner, slot.cached_ids, keep=prefix.blocks)
        if blocks:
            yield PrefixSave(slot.index, start, tuple(blocks))


def common_prefix_length(one: TokenIds[int], other: TokenIds[int]) -> int:
    """Return how many tokens two sequences share from the first on."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    # Slices are compared in C; a loop over tokens would take milliseconds for a full queue of long prompts.
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
