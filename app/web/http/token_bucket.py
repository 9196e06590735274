"""A token bucket for the `limits` library: a strategy beside its own three, and the memory that it needs.

Importing this module registers both, so that `slowapi.Limiter(strategy="token-bucket")` finds them.  Knows no request.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import cast

from limits import RateLimitItemPerSecond
from limits.limits import RateLimitItem
from limits.storage import MemoryStorage, StorageTypes
from limits.strategies import STRATEGIES, RateLimiter
from limits.util import WindowStats

STRATEGY = "token-bucket"
STORAGE_URI = "token-bucket+memory://"

MAX_BUCKETS = 50_000
"""Buckets kept; the least recently used goes first.  Who makes that many addresses gains no more by its return."""


class BucketLimit(RateLimitItemPerSecond):
    """A bucket of `amount` tokens that is filled up at a steady rate."""

    __slots__ = ("per_second",)

    def __init__(self, *, burst: int, per_minute: float, namespace: str) -> None:
        """Args:
        burst: tokens of a full bucket, so many requests at once.
        per_minute: tokens that flow back in a minute.
        namespace: keeps buckets of the same owner for different purposes apart.
        """
        self.per_second = per_minute / 60
        super().__init__(burst, multiples=math.ceil(burst / self.per_second), namespace=namespace)


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of an attempt to take tokens."""

    granted: bool
    remaining: int
    """Whole tokens left."""
    full_in: float
    """Seconds until the bucket is full again."""
    retry_in: float
    """Seconds until the attempt would be granted; 0 if it was."""


class BucketStorage(MemoryStorage):
    """The library's memory storage with buckets added; taking is one step, whatever the threads."""

    STORAGE_SCHEME = ["token-bucket+memory"]  # noqa: RUF012  # the base class declares a plain list

    def __init__(self, uri: str | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        clock: seconds that never go back.
        """
        self._clock = clock
        self._lock = Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Name -> (tokens, when they were counted)."""
        super().__init__(uri)

    def take(self, key: str, capacity: int, per_second: float, cost: int) -> Taken:
        """Take `cost` tokens if there are so many; else leave the bucket as it is."""
        with self._lock:
            tokens, now = self._level(key, capacity, per_second)
            granted = tokens >= cost
            if granted:
                tokens -= cost
            if cost:
                self._buckets[key] = (tokens, now)
                self._buckets.move_to_end(key)
            if len(self._buckets) > MAX_BUCKETS:
                self._buckets.popitem(last=False)
        return Taken(
            granted=granted,
            remaining=math.floor(tokens),
            full_in=(capacity - tokens) / per_second,
            retry_in=0.0 if granted else (cost - tokens) / per_second,
        )

    def _level(self, key: str, capacity: int, per_second: float) -> tuple[float, float]:
        now = self._clock()
        tokens, counted = self._buckets.get(key, (float(capacity), now))
        return min(float(capacity), tokens + (now - counted) * per_second), now

    def clear(self, key: str) -> None:
        with self._lock:
            self._buckets.pop(key, None)
        super().clear(key)

    def reset(self) -> int | None:
        with self._lock:
            forgotten = len(self._buckets)
            self._buckets.clear()
        return forgotten + (super().reset() or 0)


class TokenBucketRateLimiter(RateLimiter):
    """Grants at most `burst + rate * t` in any time t; what is refused costs nothing."""

    def __init__(self, storage: StorageTypes) -> None:
        if not isinstance(storage, BucketStorage):
            raise TypeError(f"a token bucket needs BucketStorage, not {type(storage).__name__}")
        super().__init__(storage)
        self._buckets = storage

    def take(self, item: BucketLimit, *identifiers: str, cost: int = 1) -> Taken:
        """Take tokens and tell what is left, in one step."""
        return self._buckets.take(item.key_for(*identifiers), item.amount, item.per_second, cost)

    def hit(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        return self.take(_bucket(item), *identifiers, cost=cost).granted

    def test(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        return self.take(_bucket(item), *identifiers, cost=0).remaining >= cost

    def get_window_stats(self, item: RateLimitItem, *identifiers: str) -> WindowStats:
        """Return when the bucket is full again, in seconds since the epoch, and the whole tokens in it."""
        looked = self.take(_bucket(item), *identifiers, cost=0)
        return WindowStats(time.time() + looked.full_in, looked.remaining)


def _bucket(item: RateLimitItem) -> BucketLimit:
    if not isinstance(item, BucketLimit):
        raise TypeError(f"a token bucket takes a BucketLimit, not {item!r}")
    return item


# The library types its table as closed, but slowapi looks every strategy up in it by name.
cast(dict[str, type[RateLimiter]], STRATEGIES)[STRATEGY] = TokenBucketRateLimiter
