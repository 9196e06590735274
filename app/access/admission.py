"""Admission: whether a caller may send one more request, and the tokens that are set aside for it.

The only entry to every limit of a key.  `admit` surrounds a request from its arrival to its last byte, `reserve` the
generation within it.  Rate limits live in an `AdmissionStore`, the monthly quota in the database; what a request may
occupy of this process, and what refusing it may cost, is counted in this process.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

from app.access.admission_store import AdmissionStore, Levels, Rates, Refusal
from app.access.quotas import QuotaReservation, Quotas
from app.access.refusals import RefusalBudget, RefusalCost
from app.access.rights import check_rights
from app.access.token_bucket import Bucket, BucketState
from app.errors import AppError, EngineBusy, QuotaExceeded, RateLimited, ServiceUnavailable
from app.fair_share import FairPlaces
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import Principal, Tenant

PLACES = 1024
"""Places that a tenant may hold in this process while no other holds any: one for each answer, or part of a body."""
PLACE_BYTES = 64 * 1024
"""Bytes of a body that take a place until the request has ended."""
MAX_ANSWERS_CHARGED = 16
"""A refused batch has tried no more than this many answers."""
PARALLEL_RETRY_SECONDS = 1.0
"""A guess: when one of the running requests ends is not known."""
NO_RATES = Rates()
_rates_of = lru_cache(maxsize=1024)(Rates.of)


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


class _OccupiedPlaces:
    """The places of this process that one request occupies."""

    def __init__(self, places: FairPlaces, tenant: Tenant, on_refusal: Callable[[str], None]) -> None:
        self._places = places
        self._tenant = tenant
        self._on_refusal = on_refusal
        self._count = 0

    def extend(self, count: int) -> None:
        """Occupy so many in all.

        Raises: RateLimited: the tenant's other requests hold as many as it may.  ServiceUnavailable: all tenants do.
        """
        more = count - self._count
        if more <= 0:
            return
        if not self._places.take(self._tenant, more):
            if self._places.held(self._tenant) > self._count:
                self._on_refusal("places")
                message = "This caller has as many requests, answers and bodies in work as it may; wait and try again."
                raise RateLimited(message, retry_after=PARALLEL_RETRY_SECONDS)
            raise ServiceUnavailable("The service has as many requests in work as it can take. Try again later.")
        self._count = count

    def release(self) -> None:
        self._places.release(self._tenant, self._count)
        self._count = 0


class Admitted:
    """A request that has been let in."""

    def __init__(
        self,
        store: AdmissionStore,
        key_id: str,
        rates: Rates,
        requests: BucketState | None,
        occupied: _OccupiedPlaces,
        refusals: RefusalBudget,
    ) -> None:
        """Args: requests: the level after the request was taken; None without such a limit."""
        self._store = store
        self._key_id = key_id
        self._rates = rates
        self._requests = requests
        self._occupied = occupied
        self._refusals = refusals
        self._answers = 1

    def expect(self, answers: int) -> None:
        """Occupy a place for each answer that the request is to have.

        Raises: RateLimited, ServiceUnavailable: there are not so many places for this caller, or for anyone.
        """
        self._answers = answers
        self._occupied.extend(answers)

    def refuse(self, error: AppError) -> None:
        """Charge the key with an error that refused the request, and let the error say when another may be sent."""
        if isinstance(error, RateLimited | QuotaExceeded):
            self._refusals.charge(self._key_id, RefusalCost.LATE)
        elif isinstance(error, EngineBusy):
            self._refusals.charge(self._key_id, RefusalCost.BUSY * min(self._answers, MAX_ANSWERS_CHARGED))
        if error.retry_after is not None:
            error.retry_after = max(error.retry_after, _until_one(self._requests))

    async def limits(self) -> Sequence[LimitState]:
        """Return the requests left after this one, and the tokens left now."""
        if self._rates == NO_RATES:
            return ()
        levels = await self._store.peek(self._key_id, Rates(tokens=self._rates.tokens))
        return _limit_states(self._rates, Levels(self._requests, levels.tokens))


class Reservation:
    """Tokens set aside for one generation."""

    def __init__(self, tokens: int, put_back: Callable[[int], Awaitable[None]] | None) -> None:
        """Args: put_back: returns some of the tokens at once; None where no limit a minute has given them."""
        self.counted = False
        """Whether the quota counts the tokens that are committed."""
        self.used = 0
        self._tokens = tokens
        self._put_back = put_back

    async def lower(self, tokens: int) -> None:
        """Put back what is set aside beyond so many: the request cannot take more."""
        over, self._tokens = self._tokens - tokens, min(tokens, self._tokens)
        if over > 0 and self._put_back is not None:
            await self._put_back(over)

    def commit(self, tokens: int) -> None:
        """Note what was really used; it is written down when the context is left."""
        self.used = tokens


class AdmissionControl:
    """Enforces the limits of all keys; lives as long as the application."""

    def __init__(
        self,
        store: AdmissionStore,
        quotas: Quotas,
        *,
        on_refusal: Callable[[str], None],
        refusals: RefusalBudget | None = None,
        places: int = PLACES,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Args:
        on_refusal: is called for every request that a limit refuses for now, with the limit's name.
        refusals: what refused requests may cost.
        tracer: measures how long a request waits here.
        places: that a tenant may hold in this process while no other holds any.
        """
        self._store = store
        self._quotas = quotas
        self._on_refusal = on_refusal
        self._refusals = refusals or RefusalBudget()
        self._places = FairPlaces(places)
        self._tracer = tracer

    # The plain function, so that whoever is handed this object needs no import of this package.
    check_rights = staticmethod(check_rights)

    @asynccontextmanager
    async def admit(self, principal: Principal, body_bytes: int = 0) -> AsyncIterator[Admitted]:
        """Let one request in, and free its places when the context is left.

        Minute tokens and the monthly quota are only looked at: a caller who has none left is refused before any work is
        done.  A refused request costs one of the caller's requests, and a caller who is refused again and again waits.

        Args: body_bytes: length of the body that is about to be read.
        Raises:
            RateLimited: a rate limit is reached, or too many requests of this key or of its tenant run.
            ServiceUnavailable: so many requests of other tenants run that there is no place for this body.
            QuotaExceeded: this month's tokens are used up.
            StoreUnavailable: Redis does not answer, and the policy is to refuse then.
        """
        occupied = _OccupiedPlaces(self._places, principal.tenant, self._on_refusal)
        async with AsyncExitStack() as stack:
            stack.callback(occupied.release)
            with self._tracer.span("admission"):
                await self._occupy(occupied, principal, max(1, math.ceil(body_bytes / PLACE_BYTES)))
                requests = await stack.enter_async_context(self._parallel_place(principal))
            rates = _rates_of(principal.limits)
            yield Admitted(self._store, principal.key_id, rates, requests, occupied, self._refusals)

    async def _occupy(self, occupied: _OccupiedPlaces, principal: Principal, places: int) -> None:
        """Occupy places, once the caller's refused requests are paid for.

        Raises: RateLimited, ServiceUnavailable: there are not so many.
        """
        try:
            occupied.extend(places)
        except AppError:
            self._refusals.charge(principal.key_id, RefusalCost.EARLY)
            await self._wait_for_budget(principal)
            raise
        await self._wait_for_budget(principal)

    async def _wait_for_budget(self, principal: Principal) -> None:
        if wait := self._refusals.seconds_to_wait(principal.key_id):
            await asyncio.sleep(wait)

    @asynccontextmanager
    async def _parallel_place(self, principal: Principal) -> AsyncIterator[BucketState | None]:
        """Take a request and a parallel place while the context lasts; return the level of the requests."""
        rates = _rates_of(principal.limits)
        decision = await self._store.admit(principal.key_id, rates)
        if decision.refused is not None:
            self._refusals.charge(principal.key_id, RefusalCost.EARLY)
            raise self._refusal(decision.refused, rates, decision.levels)
        try:
            try:
                with self._counting_quota():
                    await self._quotas.check(principal)
            except QuotaExceeded:
                self._refusals.charge(principal.key_id, RefusalCost.EARLY)
                raise
            yield decision.levels.requests
        finally:
            if decision.place is not None:
                await self._store.leave(decision.place)

    async def check_tokens(self, principal: Principal, tokens: int) -> None:
        """Refuse a request that takes at least so many tokens, as far as that is known without a transaction.

        Raises: QuotaExceeded: so many are not left of the month.
        """
        with self._counting_quota():
            await self._quotas.check(principal, tokens)

    @asynccontextmanager
    async def reserve(
        self, principal: Principal, tokens: int, count: Callable[[], Awaitable[int]] | None = None
    ) -> AsyncIterator[Reservation]:
        """Set aside minute tokens, then tokens of the month, and put back what was not used when the context is left.

        Without `Reservation.commit` nothing counts as used.

        Args:
            count: tells how many are needed at most where `tokens` may be too many.  It is asked where that matters:
                for a key with a quota, which is reserved in the database, and before a limit refuses the request.
        Raises: on entering, and then nothing is taken:
            RateLimited: so many tokens a minute are not left, or never will be.
            QuotaExceeded: so many tokens of the month are not left.
            StoreUnavailable: the database, or Redis, does not answer, and the policy is to refuse then.
        """
        if count is not None and principal.limits.monthly_tokens:
            tokens, count = await count(), None
        key_id, bucket = principal.key_id, _rates_of(principal.limits).tokens
        taken: BucketState | None = None
        put_back = None
        if bucket:
            tokens, taken = await self._take_tokens(key_id, bucket, tokens, count)
            put_back = partial(self._store.return_tokens, key_id, bucket, local=taken.local)
        reservation = Reservation(tokens, put_back)
        quota: QuotaReservation | None = None
        try:
            with self._counting_quota():
                quota = await self._quotas.reserve(principal, tokens)
            reservation.counted = quota is not None
            yield reservation
        finally:
            # Neither step can be cut off by a cancellation: the store promises that, and the commit is queued at once.
            try:
                await reservation.lower(reservation.used)
            finally:
                if quota is not None:
                    await self._quotas.commit(quota, reservation.used)

    async def limits(self, principal: Principal) -> Sequence[LimitState]:
        """Return what is left of this caller's rate limits; takes nothing."""
        rates = _rates_of(principal.limits)
        return () if rates == NO_RATES else _limit_states(rates, await self._store.peek(principal.key_id, rates))

    async def _take_tokens(
        self, key_id: str, bucket: Bucket, tokens: int, count: Callable[[], Awaitable[int]] | None
    ) -> tuple[int, BucketState]:
        """Take so many tokens, or those that are really needed where so many are not there; return how many it took."""
        if count is not None:
            if tokens <= bucket.capacity:
                taken = await self._store.take_tokens(key_id, bucket, tokens)
                if taken.granted:
                    return tokens, taken
            tokens = await count()
        if tokens > bucket.capacity:
            raise RateLimited(
                f"The request could take {tokens} tokens, and this API key has {bucket.capacity} a minute. "
                "Lower max_tokens, or shorten the prompt.",
                details={"limit": bucket.capacity, "requested": tokens},
            )
        taken = await self._store.take_tokens(key_id, bucket, tokens)
        if not taken.granted:
            raise self._too_many("tokens", taken.retry_in)
        return tokens, taken

    @contextmanager
    def _counting_quota(self) -> Iterator[None]:
        """Count what a quota refuses in the block."""
        try:
            yield
        except QuotaExceeded:
            self._on_refusal("quota")
            raise

    def _refusal(self, refused: Refusal, rates: Rates, levels: Levels) -> RateLimited:
        next_request = _until_one(levels.requests)
        if refused is Refusal.PARALLEL:
            self._on_refusal("parallel")
            message = f"This API key has {rates.parallel_requests} requests running, as many as it may."
            return RateLimited(message, retry_after=max(PARALLEL_RETRY_SECONDS, next_request))
        if refused is Refusal.TOKENS:
            return self._too_many("tokens", max(_until_one(levels.tokens), next_request))
        return self._too_many("requests", next_request)

    def _too_many(self, kind: str, retry_after: float) -> RateLimited:
        self._on_refusal(kind)
        return RateLimited(f"Too many {kind} with this API key; wait and try again.", retry_after=retry_after)


def _until_one(state: BucketState | None) -> float:
    """Return the seconds until a bucket holds one token."""
    return state.next_in if state else 0.0


def _limit_states(rates: Rates, levels: Levels) -> list[LimitState]:
    of = (("requests", rates.requests, levels.requests), ("tokens", rates.tokens, levels.tokens))
    return [
        LimitState(kind, bucket.capacity, min(state.remaining, bucket.capacity), max(0.0, state.full_in))
        for kind, bucket, state in of
        if bucket and state
    ]
