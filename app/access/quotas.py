"""The monthly quotas: tokens are reserved before a generation and committed after it.

One task writes for all requests of the process.  Requests never wait for a slow database longer than `WAIT_SECONDS`; a
commit that could not be written stays queued and is tried again.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import structlog
from cachetools import LRUCache
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from app.access import ledger
from app.access.background import BackgroundGroup, periodic
from app.access.database import WAIT_SECONDS, Database
from app.access.ledger import Balance, Commit, Month, Reserve
from app.access.queued_writer import QueuedWriter
from app.config import QuotaConfig
from app.errors import QuotaExceeded, StoreUnavailable
from app.types import Principal

MAX_BATCH = 64
"""Operations in one transaction."""
MAX_WAITING = 100_000
"""Commits queued for a database that is away; the oldest goes first, and its lease ends its reservation."""
MAX_CLOCK_SKEW = timedelta(days=1)
"""How far the clocks of replicas may be apart; a lease that ends later than that is nobody's any more."""
MAX_REMEMBERED = 10_000
"""Counters whose use is remembered."""
LEAST_TOKENS = 2
"""No request takes fewer: a token of its prompt and one of its completion."""
RESERVED_RETRY_SECONDS = 1.0
"""Retry-After of a request that only the reservations of running ones refuse: most of them are larger than the use."""
CHECK_SECONDS = 1.0
"""How long the balance of a month that is used up is good for refusals."""

_log = structlog.get_logger("llm_service")


@dataclass(frozen=True, slots=True)
class QuotaReservation:
    """Tokens of a month set aside for one request."""

    id: str
    counter: Month


@dataclass(slots=True)
class _Operation:
    order: Reserve | Commit
    done: asyncio.Future[Balance]
    tried: bool = False


class Quotas:
    """The monthly tokens of all keys; lives as long as the application, between `start` and `close`."""

    def __init__(
        self, database: Database, config: QuotaConfig, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._db = database
        self._config = config
        self._now = now
        self._writer = QueuedWriter(self._write, on_drop=self._drop, max_batch=MAX_BATCH, max_waiting=MAX_WAITING)
        self._live: set[str] = set()
        """Reservations that a request of this process still needs."""
        self._used: LRUCache[Month, int] = LRUCache(MAX_REMEMBERED)
        """Tokens used of each counter as last seen; other replicas may have used more since, never less."""
        self._checked: LRUCache[Month, tuple[Balance, datetime]] = LRUCache(MAX_REMEMBERED)
        """Balances of months that had too little left, and when they were queried."""
        self._queries: dict[Month, asyncio.Future[Balance]] = {}
        """Queries of such balances that run now, one for all requests that wait for it."""

    def start(self, background: BackgroundGroup) -> None:
        self._writer.start(background)
        background.spawn(periodic(self._config.lease_seconds / 4, self._renew_leases))

    async def close(self) -> None:
        """Write what is queued, if the database takes it."""
        await self._writer.close()

    async def check(self, caller: Principal, tokens: int = LEAST_TOKENS) -> None:
        """Refuse a request that takes at least so many tokens, as far as this process knows what the month has left.

        Where that seems too little it queries the database, but not for each of many requests.

        Raises: QuotaExceeded: fewer tokens are left.
        """
        limit = caller.limits.monthly_tokens
        if not limit:
            return
        now = self._now()
        counter = Month(caller.key_id, month_of(now))
        if self._used.get(counter, 0) + tokens <= limit:
            return
        # In an outage `reserve` decides.
        with suppress(StoreUnavailable):
            balance = await self._latest(counter, now)
            if balance.used + tokens > limit:
                raise _exceeded(limit, balance, tokens if tokens > LEAST_TOKENS else None, now)

    async def _latest(self, counter: Month, now: datetime) -> Balance:
        """Return a balance that is no older than `CHECK_SECONDS`."""
        balance, queried = self._checked.get(counter, (None, now))
        old = now - queried > timedelta(seconds=CHECK_SECONDS)
        if balance is None or old or balance.used < self._used.get(counter, 0):
            balance = await self._query(counter)
            self._used[counter] = balance.used
            self._checked[counter] = balance, now
        return balance

    async def _query(self, counter: Month) -> Balance:
        query = self._queries.get(counter)
        if query is None:
            query = self._queries[counter] = asyncio.ensure_future(ledger.balance(self._db, counter))
            query.add_done_callback(partial(self._queried, counter))
        return await asyncio.shield(query)

    def _queried(self, counter: Month, query: asyncio.Future[Balance]) -> None:
        del self._queries[counter]
        if not query.cancelled():
            query.exception()  # Retrieved even if every request has left: asyncio would log it otherwise.

    async def reserve(self, caller: Principal, tokens: int) -> QuotaReservation | None:
        """Set tokens aside; return None for a caller without a quota, or in an outage if that is the policy.

        Raises:
            QuotaExceeded: so many are not left.
            StoreUnavailable: the database does not answer.
        """
        limit = caller.limits.monthly_tokens
        if not limit:
            return None
        now = self._now()
        reservation = QuotaReservation(uuid4().hex, Month(caller.key_id, month_of(now)))
        expires = now + timedelta(seconds=self._config.lease_seconds)
        order = Reserve(id=reservation.id, counter=reservation.counter, tokens=tokens, limit=limit, expires=expires)
        self._live.add(reservation.id)
        try:
            balance = await self._grant(order)
        except BaseException as error:
            # It may be granted all the same, and is released then.
            self._live.discard(reservation.id)
            if isinstance(error, StoreUnavailable) and self._config.on_outage == "open":
                return None
            raise
        if not balance.granted:
            self._live.discard(reservation.id)
            self._used[reservation.counter] = balance.used
            raise _exceeded(limit, balance, tokens, now)
        return reservation

    async def commit(self, reservation: QuotaReservation, tokens: int) -> None:
        """Replace a reservation by what was really used.

        Takes effect even if the caller does not wait for it, and once the database is back if it is away.
        """
        operation = _Operation(Commit(id=reservation.id, counter=reservation.counter, tokens=tokens), _future())
        self._writer.put(operation)
        if not self._db.breaker.open:
            await self._wait(operation)

    async def balance(self, key_id: str, month: str) -> Balance:
        """Return a key's figures of a month.

        Raises: StoreUnavailable: the database does not answer.
        """
        return await ledger.balance(self._db, Month(key_id, month))

    async def _grant(self, order: Reserve) -> Balance:
        """Return the outcome.

        Raises: StoreUnavailable: the database does not answer in time; then nothing is granted, now or later.
        """
        if self._db.breaker.open:
            raise self._db.unavailable()
        operation = _Operation(order, _future())
        self._writer.put(operation)
        try:
            await self._wait(operation)
        except asyncio.CancelledError:
            self._withdraw(operation, order)
            raise
        if not operation.done.done():
            self._withdraw(operation, order)
            raise self._db.unavailable()
        return operation.done.result()

    async def _wait(self, operation: _Operation) -> None:
        await asyncio.wait([operation.done], timeout=WAIT_SECONDS)
        if not operation.done.done():
            self._db.time_out()

    def _withdraw(self, operation: _Operation, order: Reserve) -> None:
        """Cancel a reservation: leave it out where it is still queued, or release what it was granted."""
        if not operation.done.done():
            operation.done.cancel()
        elif not operation.done.cancelled() and not operation.done.exception() and operation.done.result().granted:
            self._release(order)

    def _release(self, order: Reserve) -> None:
        self._writer.put(_Operation(Commit(id=order.id, counter=order.counter, tokens=0), _future()))

    async def _write(self, batch: Sequence[_Operation]) -> Sequence[_Operation]:
        # In one order everywhere, so that two replicas never wait for each other's rows.
        wanted = sorted((each for each in batch if not each.done.cancelled()), key=lambda each: each.order.counter)
        try:
            charged = any(isinstance(each.order, Commit) for each in wanted)
            outcomes = await self._db.run_in_transaction(partial(_apply, wanted), durable=charged)
        except (StoreUnavailable, IntegrityError):
            return [each for each in wanted if self._try_again(each)]
        for each, outcome in zip(wanted, outcomes, strict=True):
            if isinstance(each.order, Commit):
                self._live.discard(each.order.id)
                self._used[each.order.counter] = max(outcome.used, self._used.get(each.order.counter, 0))
            elif each.done.cancelled() and outcome.granted:
                self._release(each.order)
            if not each.done.done():
                each.done.set_result(outcome)
        return ()

    def _drop(self, operations: Sequence[_Operation]) -> None:
        """Give up operations that cannot be written; the lease of a lost commit ends its reservation."""
        commits = 0
        for each in operations:
            if isinstance(each.order, Commit):
                self._live.discard(each.order.id)
                each.done.cancel()
                commits += 1
            elif not each.done.done():
                each.done.set_exception(self._db.unavailable())
        if commits:
            _log.error("Commits of used tokens are lost", commits=commits)

    def _try_again(self, operation: _Operation) -> bool:
        """Return whether an operation is to be written again: a commit is, a reservation fails."""
        operation.tried = True
        if isinstance(operation.order, Reserve) and not operation.done.done():
            operation.done.set_exception(self._db.unavailable())
        return isinstance(operation.order, Commit)

    async def _renew_leases(self) -> None:
        """Renew the leases of living requests, and release those that nobody renews, this process's or another's."""
        now = self._now()
        until = now + timedelta(seconds=self._config.lease_seconds)
        await self._db.run_in_transaction(partial(ledger.renew, ids=list(self._live), until=until))
        # Renewed above, no living reservation of this process expires later, however its clock was set back.
        latest = now + ledger.REMEMBERED + max(MAX_CLOCK_SKEW, 10 * (until - now))
        if released := await self._db.run_in_transaction(partial(ledger.release_expired, now=now, latest=latest)):
            _log.warning("Released what a dead process had reserved", reservations=released)


def _future() -> asyncio.Future[Balance]:
    return asyncio.get_running_loop().create_future()


def _apply(batch: Sequence[_Operation], connection: Connection) -> list[Balance]:
    return [
        ledger.reserve(connection, each.order)
        if isinstance(each.order, Reserve)
        else ledger.commit(connection, each.order, again=each.tried)
        for each in batch
    ]


def month_of(moment: datetime) -> str:
    """Return the calendar month, UTC, as 2026-11."""
    utc = moment.astimezone(UTC)
    return f"{utc.year:04}-{utc.month:02}"  # a tenth of strftime's time, once or twice for each request


def next_month(moment: datetime) -> datetime:
    """Return when the next calendar month begins, UTC."""
    first = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


def _exceeded(limit: int, balance: Balance, tokens: int | None, now: datetime) -> QuotaExceeded:
    """Args: tokens: how many the request could take; None before that is known."""
    resets = next_month(now)
    retry_after = (resets - now).total_seconds()
    request = "" if tokens is None else f"; the request could take {tokens}"
    advice = "Wait for the next month." if tokens is None else "Lower max_tokens, or wait for the next month."
    if balance.used + (tokens or LEAST_TOKENS) <= limit:
        retry_after = RESERVED_RETRY_SECONDS
        request += f", and requests that run now have reserved {balance.reserved}"
        advice = "Wait for their end."
    return QuotaExceeded(
        f"This key may use {limit} tokens a month and {balance.used} are used{request}. {advice}",
        details={
            "limit": limit,
            "used": balance.used,
            "reserved": balance.reserved,
            **({} if tokens is None else {"requested": tokens}),
            "resets": resets.isoformat().replace("+00:00", "Z"),
        },
        retry_after=retry_after,
    )
