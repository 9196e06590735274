"""The port for rate limits: what of a key a store counts, and the steps that admission needs of it.

`stores/memory_admission.py` counts in this process, `stores/redis_admission.py` for all replicas.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from app.access.token_bucket import Bucket, BucketState
from app.types import Limits


@dataclass(frozen=True, slots=True)
class Rates:
    """The limits of one key that an `AdmissionStore` enforces; None and 0 are no limit."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    parallel_requests: int = 0

    @classmethod
    def of(cls, limits: Limits) -> "Rates":
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        return cls(
            requests=Bucket(limits.burst or requests, requests / 60) if requests else None,
            tokens=Bucket(tokens, tokens / 60) if tokens else None,
            parallel_requests=limits.parallel_requests,
        )

    def share(self, parts: int) -> "Rates":
        """Return one of so many equal parts; what is limited stays so, and to one at least."""
        return Rates(
            requests=self.requests and self.requests.share(parts),
            tokens=self.tokens and self.tokens.share(parts),
            parallel_requests=self.parallel_requests and max(1, self.parallel_requests // parts),
        )


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of a key's two buckets; None where there is no such limit."""

    requests: BucketState | None
    tokens: BucketState | None


class Refusal(Enum):
    """The limit that was reached."""

    REQUESTS = auto()
    TOKENS = auto()
    PARALLEL = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of `AdmissionStore.admit`."""

    levels: Levels
    """As far as they were looked at: a refusal by one limit says nothing of the next."""
    refused: Refusal | None = None
    place: str | None = None
    """The argument of `leave`; None: the request takes no parallel place."""


class AdmissionStore(Protocol):
    """Requests, minute tokens and parallel places of every key.

    Each method is one atomic step.  The methods that return something (`leave`, `return_tokens`) never fail, and take
    effect even when the task that awaits them is cancelled meanwhile.  Those that take something raise
    `StoreUnavailable` where the store cannot be reached, and the policy is to refuse then.
    """

    async def admit(self, key_id: str, rates: Rates) -> Decision:
        """Take one request, and a parallel place if no other limit refuses it.

        The requests are looked at first, then the parallel places, then the tokens (at least one must be there).  A
        request that the latter two refuse is spent.
        """

    async def leave(self, place: str) -> None:
        """Free a parallel place."""

    async def take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> BucketState:
        """Take so many minute tokens, or none."""

    async def return_tokens(self, key_id: str, bucket: Bucket, tokens: int, *, local: bool = False) -> None:
        """Put minute tokens back.  Args: local: as `BucketState.local` said when they were taken."""

    async def peek(self, key_id: str, rates: Rates) -> Levels:
        """Return the levels as far as they are known, and take nothing; never fails."""
