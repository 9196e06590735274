"""Token buckets in this process's memory."""

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from app.access.token_bucket import Bucket, BucketState

MAX_BUCKETS = 50_000
"""Buckets stored; the least recently used goes first.  Whoever makes that many owners gains no more by its return."""


class MemoryBuckets:
    """The levels of many buckets by name; taking is one step, whatever the threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_buckets: int = MAX_BUCKETS) -> None:
        """Args: clock: seconds that never go back."""
        self._clock = clock
        self._max_buckets = max_buckets
        self._lock = Lock()
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Name -> (tokens, when they were counted)."""

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, name: str, bucket: Bucket, cost: int = 1) -> BucketState:
        """Take tokens if there are so many; 0 looks, and a negative cost puts tokens back."""
        with self._lock:
            now = self._clock()
            tokens, counted = self._levels.get(name, (float(bucket.capacity), now))
            left, state = bucket.take(bucket.level(tokens, now - counted), cost)
            if cost:
                self._levels[name] = (left, now)
                self._levels.move_to_end(name)
                if len(self._levels) > self._max_buckets:
                    self._levels.popitem(last=False)
        return state

    def clear(self, name: str) -> None:
        """Fill one bucket up."""
        with self._lock:
            self._levels.pop(name, None)

    def reset(self) -> int:
        """Fill every bucket up; return how many were not full."""
        with self._lock:
            count = len(self._levels)
            self._levels.clear()
        return count
