"""A token bucket for the `limits` library: a strategy beside its own three, and the storage that it needs.

Importing this module registers both, so that `slowapi.Limiter(strategy="token-bucket")` finds them.
"""

import math
import time
from collections.abc import Callable
from typing import cast

from limits import RateLimitItemPerSecond
from limits.limits import RateLimitItem
from limits.storage import MemoryStorage, StorageTypes
from limits.strategies import STRATEGIES, RateLimiter
from limits.util import WindowStats

from app.access.token_bucket import Bucket, BucketState
from app.stores.memory_buckets import MAX_BUCKETS, MemoryBuckets

STRATEGY = "token-bucket"
STORAGE_URI = "token-bucket+memory://"


class BucketLimit(RateLimitItemPerSecond):
    """A token bucket in the library's own notation."""

    __slots__ = ("bucket",)

    def __init__(self, *, burst: int, per_minute: float, namespace: str) -> None:
        """Args:
        burst: tokens of a full bucket, so many requests at once.
        per_minute: tokens that flow back in a minute.
        namespace: distinguishes buckets of the same owner for different purposes.
        """
        self.bucket = Bucket(burst, per_minute / 60)
        super().__init__(burst, multiples=math.ceil(burst / self.bucket.per_second), namespace=namespace)


class BucketStorage(MemoryStorage):
    """The library's memory storage with buckets added."""

    STORAGE_SCHEME = ["token-bucket+memory"]  # noqa: RUF012  # the base class declares a plain list

    def __init__(
        self,
        uri: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_buckets: int = MAX_BUCKETS,
    ) -> None:
        """Args: clock: seconds that never go back."""
        self.buckets = MemoryBuckets(clock=clock, max_buckets=max_buckets)
        super().__init__(uri)

    def clear(self, key: str) -> None:
        self.buckets.clear(key)
        super().clear(key)

    def reset(self) -> int | None:
        return self.buckets.reset() + (super().reset() or 0)


class TokenBucketRateLimiter(RateLimiter):
    """Grants at most `burst + rate * t` in any time t; what is refused costs nothing."""

    def __init__(self, storage: StorageTypes) -> None:
        if not isinstance(storage, BucketStorage):
            raise TypeError(f"a token bucket needs BucketStorage, not {type(storage).__name__}")
        super().__init__(storage)
        self._buckets = storage.buckets

    def take(self, item: BucketLimit, *identifiers: str, cost: int = 1) -> BucketState:
        """Take tokens and return what is left, in one step."""
        return self._buckets.take(item.key_for(*identifiers), item.bucket, cost)

    def hit(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        return self.take(_bucket(item), *identifiers, cost=cost).granted

    def test(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        return self.take(_bucket(item), *identifiers, cost=0).remaining >= cost

    def get_window_stats(self, item: RateLimitItem, *identifiers: str) -> WindowStats:
        """Return when the bucket is full again, in seconds since the epoch, and the whole tokens in it."""
        state = self.take(_bucket(item), *identifiers, cost=0)
        return WindowStats(time.time() + state.full_in, state.remaining)


def _bucket(item: RateLimitItem) -> BucketLimit:
    if not isinstance(item, BucketLimit):
        raise TypeError(f"a token bucket takes a BucketLimit, not {item!r}")
    return item


# The library types its table as closed, but slowapi looks every strategy up in it by name.
cast(dict[str, type[RateLimiter]], STRATEGIES)[STRATEGY] = TokenBucketRateLimiter
