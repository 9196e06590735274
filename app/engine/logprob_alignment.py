"""Aligns log-probabilities with the text that is released.

Less text may be released than there is: a stop string cuts it, a filter withholds a tail.  Character counts decide
which tokens belong to the released text.
"""

from collections import deque
from typing import Generic, TypeVar

from app.events import Delta, DetokenizedLogprob

T = TypeVar("T")


class LogprobAlignment(Generic[T]):
    """The tokens of one sample, each with the place in the whole text where it ends.

    A token may be released with its last character.  One without text (part of a character, a control token) ends
    where the next text does, or with the sample.
    """

    def __init__(self) -> None:
        self._generated = 0
        """Characters of the whole text up to now."""
        self._released = 0
        self._placed: deque[tuple[int, T]] = deque()
        self._textless: list[T] = []

    def add(self, text: str, token: T | None) -> None:
        """Append the next token and the text that it completes; None appends only the text."""
        if token is not None:
            self._textless.append(token)
        if text:
            self._place(len(text))

    def finish(self, text: str = "") -> None:
        """Append the rest of the whole text; no token follows."""
        self._place(len(text))

    def release(self, characters: int) -> tuple[tuple[T, ...], tuple[int, ...]]:
        """Release the next so many characters.

        Returns: the tokens that end within them, and for each after how many of these characters it ends.
        """
        before, self._released = self._released, self._released + characters
        released = []
        while self._placed and self._placed[0][0] <= self._released:
            released.append(self._placed.popleft())
        return tuple(token for _, token in released), tuple(end - before for end, _ in released)

    def __len__(self) -> int:
        """Return how many tokens have a place and are not released."""
        return len(self._placed)

    def _place(self, characters: int) -> None:
        self._generated += characters
        self._placed.extend((self._generated, token) for token in self._textless)
        self._textless.clear()


def shared_beginning(one: str, other: str) -> int:
    """Return how many characters two texts have in common before they differ."""
    differing = (at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
    return next(differing, min(len(one), len(other)))


class DeltaAlignment(LogprobAlignment[DetokenizedLogprob]):
    """The tokens of a sample whose deltas pass through a filter."""

    def follow(self, delta: Delta) -> None:
        """Append a delta whose tokens are placed already."""
        self._placed.extend(
            (self._generated + end, token) for end, token in zip(delta.token_ends, delta.logprobs, strict=True)
        )
        self._generated += len(delta.text)
