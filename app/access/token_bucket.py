"""The token bucket as values: how large it is, and what came of an attempt to take from it.

The arithmetic is here, so that every store computes alike; the levels live in the store.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BucketState:
    """The outcome of an attempt to take tokens, and the level after it."""

    granted: bool
    remaining: int
    """Whole tokens left."""
    full_in: float
    """Seconds until the bucket is full again."""
    retry_in: float
    """Seconds until the attempt would be granted; 0 if it was."""
    next_in: float
    """Seconds until there is one whole token."""
    local: bool = False
    """Whether it is a bucket of this process alone, while one that all share cannot be reached."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of `capacity` tokens that is refilled at a steady rate."""

    capacity: int
    per_second: float

    def level(self, tokens: float, seconds: float) -> float:
        """Return the level after a pause.  Args: tokens: the level before it."""
        return min(float(self.capacity), tokens + seconds * self.per_second)

    def take(self, level: float, cost: int) -> tuple[float, BucketState]:
        """Take `cost` tokens if there are so many, else none; a negative cost puts tokens back.

        Returns: the new level and what came of it.
        """
        granted = level >= cost
        left = min(float(self.capacity), level - cost) if granted else level
        return left, self.outcome(left, cost, granted=granted)

    def outcome(self, left: float, cost: int, *, granted: bool) -> BucketState:
        """Return what came of an attempt to take `cost` tokens.  Args: left: the level after it."""
        return BucketState(
            granted=granted,
            remaining=math.floor(left),
            full_in=(self.capacity - left) / self.per_second,
            retry_in=0.0 if granted else (cost - left) / self.per_second,
            next_in=max(0.0, (1 - left) / self.per_second),
        )

    def share(self, parts: int) -> "Bucket":
        """Return one of so many equal parts; it holds one token at least."""
        return Bucket(max(1, self.capacity // parts), self.per_second / parts)
