"""Where the prefix cache has which tokens: a radix tree for each owner, whose edges are blocks of tokens.

Pure: blocks are numbers here, their keys and values are the KV cache's.  A shared beginning is stored once, however
many sequences had it; the last tokens of each, which fill no block, have one that nothing continues.  Source of a radix
tree over a KV cache: Zheng et al., SGLang, 2024 (arXiv:2312.07104).
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator
from collections.abc import Sequence as TokenIds
from itertools import islice

BLOCK_TOKENS = 8
"""Tokens of a block: smaller ones take longer to find and copy, larger ones find less of a prefix."""

Owner = tuple[str, str | None]
"""Tenant and adapter."""
_Edge = tuple[Owner | int, tuple[int, ...]]
"""The block above, an owner for the first one, and the tokens."""


class PrefixTree:
    """Finds the stored blocks that a prompt begins with; what was used least recently makes room."""

    def __init__(self, blocks: int) -> None:
        """Args: blocks: how many there are, numbered from 0; with none, nothing is stored."""
        self._free = list(range(blocks))
        self._blocks: OrderedDict[_Edge, int] = OrderedDict()
        """Least recently used first, and each behind all that continue it: the first one has no continuation."""

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, owner: Owner, token_ids: TokenIds[int]) -> tuple[int, list[int]]:
        """Return how many tokens the longest stored prefix has, and its blocks; marks them as used."""
        path = list(self._walk(owner, token_ids))
        self._use(path)
        return sum(len(tokens) for _, tokens in path), [self._blocks[edge] for edge in path]

    def insert(
        self, owner: Owner, token_ids: TokenIds[int], *, keep: Collection[int] = (), max_blocks: int | None = None
    ) -> tuple[int, list[int]]:
        """Store a prefix, as far as there are free blocks or unused ones to evict.

        Args:
            keep: blocks that stay.
            max_blocks: how many are added at most; the next call continues behind them.
        Returns: the token that the new blocks begin with, and the blocks, to be written in this order.
        """
        path = list(self._walk(owner, token_ids))
        self._use(path)
        if sum(len(tokens) for _, tokens in path) == len(token_ids):
            return len(token_ids), []
        path = [edge for edge in path if len(edge[1]) == BLOCK_TOKENS]
        start, added = len(path) * BLOCK_TOKENS, list[int]()
        pinned = {*keep, *(self._blocks[edge] for edge in path)}
        parent: Owner | int = self._blocks[path[-1]] if path else owner
        for first in islice(range(start, len(token_ids), BLOCK_TOKENS), max_blocks):
            block = self._take_block(pinned)
            if block is None:
                break
            edge = (parent, tuple(token_ids[first : first + BLOCK_TOKENS]))
            self._blocks[edge] = parent = block
            path.append(edge)
            added.append(block)
            pinned.add(block)
        self._use(path)
        return start, added

    def _walk(self, owner: Owner, token_ids: TokenIds[int]) -> Iterator[_Edge]:
        """Yield the edges of the longest stored prefix."""
        parent: Owner | int = owner
        for first in range(0, len(token_ids), BLOCK_TOKENS):
            tokens = tuple(token_ids[first : first + BLOCK_TOKENS])
            while tokens and (parent, tokens) not in self._blocks:
                tokens = tokens[:-1]
            if not tokens:
                return
            yield parent, tokens
            if len(tokens) < BLOCK_TOKENS:
                return
            parent = self._blocks[parent, tokens]

    def _use(self, path: list[_Edge]) -> None:
        # The last one first, so that each is used after all that continue it.
        for edge in reversed(path):
            self._blocks.move_to_end(edge)

    def _take_block(self, pinned: Collection[int]) -> int | None:
        """Return a block that is free, or else the one used least recently; None where that one stays."""
        if self._free:
            return self._free.pop()
        oldest = next(iter(self._blocks), None)
        if oldest is None or self._blocks[oldest] in pinned:
            return None
        return self._blocks.pop(oldest)
