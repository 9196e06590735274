"""Rate limits of one process, in its memory."""

import time
from collections import Counter
from collections.abc import Callable

from app.access.admission_store import Decision, Levels, Rates, Refusal
from app.access.token_bucket import Bucket, BucketState
from app.stores.memory_buckets import MemoryBuckets


class MemoryAdmissionStore:
    """The `AdmissionStore` of a single replica.

    No method suspends, so each is one step of the event loop, and none can be cancelled halfway.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock: seconds that never go back."""
        self._requests = MemoryBuckets(clock=clock)
        self._tokens = MemoryBuckets(clock=clock)
        self._parallel: Counter[str] = Counter()

    async def admit(self, key_id: str, rates: Rates) -> Decision:
        parallel = rates.parallel_requests
        requests = self._requests.take(key_id, rates.requests) if rates.requests else None
        tokens = self._tokens.take(key_id, rates.tokens, 0) if rates.tokens else None
        levels = Levels(requests, tokens)
        if requests and not requests.granted:
            return Decision(levels, refused=Refusal.REQUESTS)
        if parallel and self._parallel[key_id] >= parallel:
            return Decision(levels, refused=Refusal.PARALLEL)
        if tokens and not tokens.remaining:
            return Decision(levels, refused=Refusal.TOKENS)
        if parallel:
            self._parallel[key_id] += 1
        return Decision(levels, place=key_id if parallel else None)

    async def leave(self, place: str) -> None:
        self._parallel[place] -= 1
        if not self._parallel[place]:
            del self._parallel[place]

    async def take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> BucketState:
        return self._tokens.take(key_id, bucket, tokens)

    async def return_tokens(self, key_id: str, bucket: Bucket, tokens: int, *, local: bool = False) -> None:
        self._tokens.take(key_id, bucket, -tokens)

    async def peek(self, key_id: str, rates: Rates) -> Levels:
        return Levels(
            self._requests.take(key_id, rates.requests, 0) if rates.requests else None,
            self._tokens.take(key_id, rates.tokens, 0) if rates.tokens else None,
        )
