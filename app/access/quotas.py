"""Decide whether a key has tokens left this month: reserved before an answer is made, settled after.

One task writes for all requests of the process: what arrives while a transaction runs goes into the next one together.
Requests never wait for a slow database longer than `WAIT_SECONDS`; a settlement that could not be written stays and is
tried again.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from app.access import ledger
from app.access.database import WAIT_SECONDS, Database
from app.access.ledger import Month, Reserve, Settle, Standing
from app.config import QuotaConfig
from app.errors import QuotaExceeded, StoreUnavailable
from app.types import Principal

OUTAGE_SECONDS = 1.0
"""After a failure the database is left alone for so long; requests do not wait for it meanwhile."""
MAX_BATCH = 64
"""Operations in one transaction."""
MAX_UNSETTLED = 100_000
"""Settlements kept for a database that is away; the oldest goes first, and its lease ends its reservation."""

_log = structlog.get_logger("llm_service")


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens set aside for one request."""

    id: str
    counter: Month
    quotas: "Quotas"

    async def settle(self, tokens: int) -> None:
        """Count what was really used; if the database is away this is done as soon as it is back."""
        await self.quotas.settle(self, tokens)


@dataclass(slots=True)
class _Waiting:
    order: Reserve | Settle
    done: asyncio.Future[Standing]
    tried: bool = False


class Quotas:
    """The monthly tokens of all keys; lives as long as the application, between `start` and `close`."""

    def __init__(
        self, database: Database, config: QuotaConfig, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._db = database
        self._config = config
        self._now = now
        self._waiting: deque[_Waiting] = deque()
        self._news = asyncio.Event()
        self._live: set[str] = set()
        """Reservations that a request of this process still needs."""
        self._broken_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._keep_leases())]

    async def close(self) -> None:
        """Write what is left, if the database takes it."""
        self._closing = True
        self._news.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=2 * WAIT_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def reserve(self, caller: Principal, tokens: int) -> Reservation | None:
        """Set tokens aside; return None for a caller without a quota, or in an outage if that is the policy.

        Raises:
            QuotaExceeded: so many are not left.
            StoreUnavailable: the database does not answer.
        """
        limit = caller.limits.monthly_tokens
        if not limit:
            return None
        now = self._now()
        reservation = Reservation(uuid4().hex, Month(caller.key_id, month_of(now)), self)
        expires = now + timedelta(seconds=self._config.lease_seconds)
        order = Reserve(id=reservation.id, counter=reservation.counter, tokens=tokens, limit=limit, expires=expires)
        self._live.add(reservation.id)
        try:
            standing = await self._do(order)
        except BaseException as error:
            # It may be granted all the same, and is given back then.
            self._live.discard(reservation.id)
            if isinstance(error, StoreUnavailable) and self._config.on_outage == "open":
                return None
            raise
        if not standing.granted:
            self._live.discard(reservation.id)
            raise _exceeded(limit, standing, tokens, now)
        return reservation

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        order = Settle(id=reservation.id, counter=reservation.counter, tokens=tokens)
        with suppress(StoreUnavailable):
            await self._do(order)

    async def standing(self, key_id: str, month: str) -> Standing:
        """Return how a key stands in a month.

        Raises: StoreUnavailable: the database does not answer.
        """
        return await ledger.standing(self._db, Month(key_id, month))

    async def _do(self, order: Reserve | Settle) -> Standing:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(order, _future())
        if loop.time() < self._broken_until:
            if isinstance(order, Settle):
                self._keep(waiting)
            raise StoreUnavailable()
        self._waiting.append(waiting)
        self._news.set()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                return await asyncio.shield(waiting.done)
        except TimeoutError:
            self._broken_until = loop.time() + OUTAGE_SECONDS
            self._withdraw(waiting)
            raise StoreUnavailable() from None
        except asyncio.CancelledError:
            self._withdraw(waiting)
            raise

    def _withdraw(self, waiting: _Waiting) -> None:
        """Nobody wants a reservation any more: do not make it, or give back what it was granted."""
        if isinstance(waiting.order, Settle):
            return
        if not waiting.done.done():
            waiting.done.cancel()
        elif not waiting.done.exception() and waiting.done.result().granted:
            self._give_back(waiting.order)

    def _give_back(self, order: Reserve) -> None:
        self._keep(_Waiting(Settle(id=order.id, counter=order.counter, tokens=0), _future()))

    def _keep(self, waiting: _Waiting) -> None:
        self._waiting.append(waiting)
        self._news.set()
        if len(self._waiting) > MAX_UNSETTLED:
            lost = self._waiting.popleft()
            lost.done.cancel()
            _log.error("The database is away for too long: a settlement of tokens is lost")

    async def _write(self) -> None:
        while not (self._closing and not self._waiting):
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
                continue
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            batch = [each for each in batch if not each.done.cancelled()]
            # In one order everywhere, so that two replicas never wait for each other's rows.
            batch.sort(key=lambda each: each.order.counter)
            if not await self._write_batch(batch):
                if self._closing:
                    return
                await asyncio.sleep(OUTAGE_SECONDS)

    async def _write_batch(self, batch: list[_Waiting]) -> bool:
        try:
            outcomes = await self._db.quickly(partial(_apply, batch))
        except (StoreUnavailable, IntegrityError):
            self._broken_until = asyncio.get_running_loop().time() + OUTAGE_SECONDS
            for each in batch:
                each.tried = True
                if isinstance(each.order, Settle):
                    self._waiting.append(each)
                elif not each.done.done():
                    each.done.set_exception(StoreUnavailable())
            return False
        for each, outcome in zip(batch, outcomes, strict=True):
            if isinstance(each.order, Settle):
                self._live.discard(each.order.id)
            elif each.done.cancelled() and outcome.granted:
                self._give_back(each.order)
            if not each.done.done():
                each.done.set_result(outcome)
        return True

    async def _keep_leases(self) -> None:
        """Renew the leases of living requests, and release those that nobody renews, this process's or another's."""
        while True:
            await asyncio.sleep(self._config.lease_seconds / 4)
            now = self._now()
            until = now + timedelta(seconds=self._config.lease_seconds)
            with suppress(StoreUnavailable):
                await self._db.quickly(partial(ledger.renew, ids=list(self._live), until=until))
                released = await self._db.quickly(partial(ledger.release_expired, now=now))
                if released:
                    _log.warning("Released what a dead process had reserved", reservations=released)


def _future() -> asyncio.Future[Standing]:
    return asyncio.get_running_loop().create_future()


def _apply(batch: list[_Waiting], connection: Connection) -> list[Standing]:
    return [
        ledger.reserve(connection, each.order)
        if isinstance(each.order, Reserve)
        else ledger.settle(connection, each.order, again=each.tried)
        for each in batch
    ]


def month_of(moment: datetime) -> str:
    """Return the calendar month, UTC, as 2026-11."""
    return moment.astimezone(UTC).strftime("%Y-%m")


def next_month(moment: datetime) -> datetime:
    """Return when the next calendar month begins, UTC."""
    first = moment.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


def _exceeded(limit: int, standing: Standing, tokens: int, now: datetime) -> QuotaExceeded:
    resets = next_month(now)
    return QuotaExceeded(
        f"This key may use {limit} tokens a month and {standing.used} are used; the request could take {tokens}. "
        "Lower max_tokens, or wait for the next month.",
        details={
            "limit": limit,
            "used": standing.used,
            "reserved": standing.reserved,
            "requested": tokens,
            "resets": resets.isoformat().replace("+00:00", "Z"),
        },
        retry_after=(resets - now).total_seconds(),
    )
