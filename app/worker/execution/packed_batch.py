"""Where the tokens of one forward pass belong: which row, which place in it, and what each may look at.

Groups tokens so that attention is computed in few calls: the single tokens of neighbouring rows together, and each
longer piece by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

CALL_COST = 1500
"""What one more attention call costs, in keys read: about 15 us beside 10 ns for each key of a row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence, to be computed in one row."""

    row: int
    start: int
    """Position of the first of them."""
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Group(Protocol):
    """Tokens whose attention is computed in one call."""

    @property
    def tokens(self) -> slice:
        """Their places in the pass."""

    @property
    def rows(self) -> slice:
        """Their rows."""

    @property
    def end(self) -> int:
        """Keys up to here are looked at."""

    def first(self, window: int | None) -> int:
        """Return the first key that any of them looks at."""

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Return what is added to the scores: 0, or -inf for keys not looked at; None where that is plain."""


@dataclass(frozen=True, slots=True)
class Singles:
    """One token of each of some neighbouring rows; without a mask all keys are looked at."""

    tokens: slice
    rows: slice
    ends: tuple[int, ...]
    """Keys of each row, its new one included."""
    positions: Tensor
    """(rows,) of the tokens."""

    @property
    def end(self) -> int:
        return max(self.ends)

    def first(self, window: int | None) -> int:
        return 0 if window is None else max(0, min(self.ends) - window)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """(rows, 1, 1, keys)"""
        if min(self.ends) == max(self.ends):
            return None
        return _mask(self.positions, self.first(window), self.end, window, like)[:, None, None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one row; without a mask each looks at itself and all before it."""

    tokens: slice
    piece: Piece
    positions: Tensor
    """(tokens,)"""

    @property
    def rows(self) -> slice:
        return slice(self.piece.row, self.piece.row + 1)

    @property
    def end(self) -> int:
        return self.piece.end

    def first(self, window: int | None) -> int:
        return 0 if window is None else max(0, self.piece.start + 1 - window)

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """(tokens, keys)"""
        if self.piece.start == 0 and (window is None or self.end <= window):
            return None
        return _mask(self.positions, self.first(window), self.end, window, like)


class Layout:
    """One forward pass."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        """Args: pieces: single tokens first, by row; then longer ones; every row at most once."""
        flat = [
            [token for piece in pieces for token in piece.tokens],
            [position for piece in pieces for position in range(piece.start, piece.end)],
            [piece.row for piece in pieces for _ in piece.tokens],
        ]
        pinned = torch.tensor(flat, dtype=torch.long, pin_memory=device.type == "cuda")
        numbers = pinned.to(device, non_blocking=True)
        self.ids, self.positions = numbers[:1], numbers[1:2]
        """(1, tokens) each."""
        self.rows = numbers[2]
        """(tokens,)"""
        self._pieces = pieces
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._seen: dict[int | None, tuple[Tensor, Tensor]] = {}

    @cached_property
    def groups(self) -> list[Group]:
        """For torch's attention only; the compiled one takes tokens as they are."""
        singles = [piece for piece in self._pieces if len(piece.tokens) == 1]
        longer, positions = self._pieces[len(singles) :], self.positions[0]
        return [*_runs(singles, positions), *_chunks(longer, len(singles), positions)]

    def seen(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the first key that each token looks at and the one after its last, made once for all layers."""
        if window not in self._seen:
            end = self.positions[0] + 1
            first = torch.zeros_like(end) if window is None else (end - window).clamp_(min=0)
            self._seen[window] = first, end
        return self._seen[window]

    def mask(self, number: int, window: int | None, like: Tensor) -> Tensor | None:
        """Return the mask of a group, made once for all layers."""
        if (number, window) not in self._masks:
            self._masks[number, window] = self.groups[number].mask(window, like)
        return self._masks[number, window]


def additive(seen: Tensor, like: Tensor) -> Tensor:
    """Turn booleans into what is added to scores."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _mask(positions: Tensor, first: int, end: int, window: int | None, like: Tensor) -> Tensor:
    """Return (positions, keys from `first` to `end`)."""
    keys, last = torch.arange(first, end, device=like.device), positions[:, None]
    seen = keys <= last
    if window is not None:
        seen &= keys > last - window
    return additive(seen, like)


def _runs(singles: Sequence[Piece], positions: Tensor) -> list[Singles]:
    """Group single tokens of neighbouring rows so that calls and keys read in vain together cost least."""
    costs, cuts = [0], [0]
    for end in range(1, len(singles) + 1):
        longest, best, cut = 0, None, end - 1
        for begin in range(end - 1, -1, -1):
            if begin < end - 1 and singles[begin].row + 1 != singles[begin + 1].row:
                break
            longest = max(longest, singles[begin].end)
            cost = costs[begin] + CALL_COST + (end - begin) * longest
            if best is None or cost < best:
                best, cut = cost, begin
        costs.append(best or 0)
        cuts.append(cut)
    runs: list[Singles] = []
    end = len(singles)
    while end:
        begin = cuts[end]
        rows = slice(singles[begin].row, singles[end - 1].row + 1)
        ends = tuple(piece.end for piece in singles[begin:end])
        runs.append(Singles(slice(begin, end), rows, ends, positions[begin:end]))
        end = begin
    return runs


def _chunks(pieces: Sequence[Piece], place: int, positions: Tensor) -> list[Chunk]:
    """Find the places of longer pieces among the tokens, from `place` on."""
    found: list[Chunk] = []
    for piece in pieces:
        tokens = slice(place, place + len(piece.tokens))
        found.append(Chunk(tokens, piece, positions[tokens]))
        place = tokens.stop
    return found
