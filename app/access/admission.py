"""Admission: whether a caller may send one more request, and the tokens that are set aside for it.

The only entry to every limit of a key.  `admit` surrounds a request from its arrival to its last byte, `reserve` the
generation within it.  Rate limits live in an `AdmissionStore`, the monthly quota in the database.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Protocol

from app.access.quotas import QuotaReservation, Quotas
from app.access.rights import check_rights
from app.access.token_bucket import Bucket, BucketState
from app.errors import QuotaExceeded, RateLimited
from app.types import Limits, Principal

PARALLEL_RETRY_SECONDS = 1.0
"""A guess: when one of the running requests ends is not known."""


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


NO_RATES = Rates()
_rates_of = lru_cache(maxsize=1024)(Rates.of)


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

    Each method is one atomic step.  The methods that return something (`leave`, `refund`, `return_tokens`) take effect
    even when the task that awaits them is cancelled meanwhile.
    """

    async def admit(self, key_id: str, rates: Rates) -> Decision:
        """Look at every limit, then take one request and a parallel place, or neither.

        The parallel places are looked at first, then the tokens (at least one must be there), then the requests.
        """

    async def leave(self, place: str) -> None:
        """Free a parallel place."""

    async def refund(self, key_id: str, bucket: Bucket) -> BucketState:
        """Put one request back."""

    async def take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> BucketState:
        """Take so many minute tokens, or none."""

    async def return_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> None:
        """Put minute tokens back."""

    async def peek(self, key_id: str, rates: Rates) -> Levels:
        """Return the levels, and take nothing."""


@dataclass(frozen=True, slots=True)
class LimitState:
    """One rate limit as a client sees it."""

    kind: str
    """requests or tokens."""
    limit: int
    """The bucket's capacity, so that `remaining` never exceeds it."""
    remaining: int
    reset_seconds: float
    """Until the bucket is full again."""


class Admitted:
    """A request that has been let in."""

    def __init__(self, store: AdmissionStore, key_id: str, rates: Rates, requests: BucketState | None) -> None:
        """Args: requests: the level after the request was taken; None without such a limit."""
        self._store = store
        self._key_id = key_id
        self._rates = rates
        self._requests = requests

    async def refund(self) -> None:
        """Give the request back: it was refused later on."""
        if self._rates.requests:
            self._requests = await self._store.refund(self._key_id, self._rates.requests)

    async def limits(self) -> Sequence[LimitState]:
        """Return the requests left after this one, and the tokens left now."""
        if self._rates is NO_RATES:
            return ()
        levels = await self._store.peek(self._key_id, Rates(tokens=self._rates.tokens))
        return _limit_states(self._rates, Levels(self._requests, levels.tokens))


class Reservation:
    """Tokens set aside for one generation."""

    def __init__(self, *, counted: bool) -> None:
        """Args: counted: whether the quota counts the tokens that are committed."""
        self.counted = counted
        self.used = 0

    def commit(self, tokens: int) -> None:
        """Note what was really used; it is written down when the context is left."""
        self.used = tokens


class AdmissionControl:
    """Enforces the limits of all keys; lives as long as the application."""

    def __init__(self, store: AdmissionStore, quotas: Quotas, *, enabled: bool, on_refusal: Callable[[], None]) -> None:
        """Args:
        enabled: False enforces no rate limit, only the quotas.
        on_refusal: is called for every request that a rate limit refuses for now.
        """
        self._store = store
        self._quotas = quotas
        self._enabled = enabled
        self._on_refusal = on_refusal

    # The plain function, so that whoever is handed this object needs no import of this package.
    check_rights = staticmethod(check_rights)

    @asynccontextmanager
    async def admit(self, principal: Principal) -> AsyncIterator[Admitted]:
        """Let one request in, and free its parallel place when the context is left.

        Minute tokens and the monthly quota are only looked at: a caller who has none left is refused before any work is
        done.  A refused request costs nothing.

        Raises:
            RateLimited: a rate limit is reached, or too many requests of this key run.
            QuotaExceeded: this month's tokens are used up.
        """
        rates = self._rates(principal)
        decision = await self._store.admit(principal.key_id, rates)
        if decision.refused is not None:
            raise self._refusal(decision.refused, rates, decision.levels)
        admitted = Admitted(self._store, principal.key_id, rates, decision.levels.requests)
        try:
            try:
                await self._quotas.check(principal)
            except QuotaExceeded:
                await admitted.refund()
                raise
            yield admitted
        finally:
            if decision.place is not None:
                await self._store.leave(decision.place)

    @asynccontextmanager
    async def reserve(self, principal: Principal, tokens: int) -> AsyncIterator[Reservation]:
        """Set aside minute tokens, then tokens of the month, and put back what was not used when the context is left.

        Without `Reservation.commit` nothing counts as used.

        Raises: on entering, and then nothing is taken:
            RateLimited: so many tokens a minute are not left, or never will be.
            QuotaExceeded: so many tokens of the month are not left.
            StoreUnavailable: the database does not answer, and the policy is to refuse then.
        """
        bucket = self._rates(principal).tokens
        if bucket:
            await self._take_tokens(principal.key_id, bucket, tokens)
        reservation = Reservation(counted=False)
        quota: QuotaReservation | None = None
        try:
            quota = await self._quotas.reserve(principal, tokens)
            reservation.counted = quota is not None
            yield reservation
        finally:
            # Neither step can be cut off by a cancellation: the store promises that, and the commit is queued at once.
            try:
                if bucket and tokens > reservation.used:
                    await self._store.return_tokens(principal.key_id, bucket, tokens - reservation.used)
            finally:
                if quota is not None:
                    await self._quotas.commit(quota, reservation.used)

    async def limits(self, principal: Principal) -> Sequence[LimitState]:
        """Return what is left of this caller's rate limits; takes nothing."""
        rates = self._rates(principal)
        return () if rates is NO_RATES else _limit_states(rates, await self._store.peek(principal.key_id, rates))

    def _rates(self, principal: Principal) -> Rates:
        return _rates_of(principal.limits) if self._enabled else NO_RATES

    async def _take_tokens(self, key_id: str, bucket: Bucket, tokens: int) -> None:
        if tokens > bucket.capacity:
            raise RateLimited(
                f"The request could take {tokens} tokens, and this API key has {bucket.capacity} a minute. "
                "Lower max_tokens, or shorten the prompt.",
                details={"limit": bucket.capacity, "requested": tokens},
            )
        taken = await self._store.take_tokens(key_id, bucket, tokens)
        if not taken.granted:
            raise self._too_many("tokens", taken.retry_in)

    def _refusal(self, refused: Refusal, rates: Rates, levels: Levels) -> RateLimited:
        if refused is Refusal.PARALLEL:
            self._on_refusal()
            message = f"This API key has {rates.parallel_requests} requests running, as many as it may."
            return RateLimited(message, retry_after=PARALLEL_RETRY_SECONDS)
        if refused is Refusal.TOKENS:
            return self._too_many("tokens", _until_one(rates.tokens, levels.tokens))
        return self._too_many("requests", levels.requests.retry_in if levels.requests else 0.0)

    def _too_many(self, kind: str, retry_after: float) -> RateLimited:
        self._on_refusal()
        return RateLimited(f"Too many {kind} with this API key; wait and try again.", retry_after=retry_after)


def _until_one(bucket: Bucket | None, state: BucketState | None) -> float:
    """Return the seconds until a bucket holds one token."""
    if bucket is None or state is None:
        return 0.0
    return max(0.0, state.full_in - (bucket.capacity - 1) / bucket.per_second)


def _limit_states(rates: Rates, levels: Levels) -> list[LimitState]:
    of = (("requests", rates.requests, levels.requests), ("tokens", rates.tokens, levels.tokens))
    return [
        LimitState(kind, bucket.capacity, min(state.remaining, bucket.capacity), max(0.0, state.full_in))
        for kind, bucket, state in of
        if bucket and state
    ]
