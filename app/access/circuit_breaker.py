"""The circuit breaker of the database, and of Redis: while one is known to be away, requests fail at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.access.faults import Fault
from app.errors import StoreUnavailable

PROBE_SECONDS = 1.0
"""Pause between two attempts to reach a database that was away."""

log = logging.getLogger(__name__)


class CircuitBreaker:
    """Shared by everything that waits for one database.

    Callers with a fallback for what they read look at `degraded` and use it at the first sign of trouble; callers that
    have to write, and would refuse their request, look at `open`.  A transaction that succeeds closes the breaker for
    its like: one that only read proves nothing about a full disk.  While it is not closed a probe tries a transaction
    now and then, so that no request has to.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[object]],
        *,
        store: str = "The database",
        probe_seconds: float = PROBE_SECONDS,
    ) -> None:
        """Args:
        probe: a short transaction; raises StoreUnavailable if the database does not answer.
        store: what the log calls it.
        """
        self._store = store
        self._probe = probe
        self._probe_seconds = probe_seconds
        self._trouble = asyncio.Event()
        """Set while `open` or `degraded`."""
        self.degraded = False
        """Whether reading failed, or somebody gave up waiting early."""
        self.fault: Fault | None = None
        """What was wrong at the last attempt; None if it succeeded."""

    @property
    def open(self) -> bool:
        """Whether the last attempt failed."""
        return self.fault is not None

    def slow(self) -> None:
        """Note that somebody gave up waiting before the database's own time was over."""
        self.degraded = True
        self._trouble.set()

    def trip(self, fault: Fault = Fault.UNREACHABLE) -> None:
        """Open: the database failed, or did not answer in its time."""
        if fault is not self.fault:
            log.warning("%s %s", self._store, fault)
        self.fault = fault
        self.degraded = not fault.only_writes
        self._trouble.set()

    def reset(self, *, wrote: bool = True) -> None:
        """Close: the database answers.

        Args: wrote: whether the transaction could write.
        """
        self.degraded = False
        if self.fault is None or wrote or not self.fault.only_writes:
            if self.fault is not None:
                log.warning("%s works again", self._store)
            self.fault = None
            self._trouble.clear()

    async def watch(self) -> None:
        """Probe for ever, while the breaker is not closed."""
        while True:
            await self._trouble.wait()
            await asyncio.sleep(self._probe_seconds)
            if not self._trouble.is_set():
                continue
            try:
                await self._probe()
            except StoreUnavailable:
                if not self.open:
                    self.trip()
                continue
            except Exception:
                # It answers; whatever is wrong beyond that, the requests themselves report.
                log.exception("the probe failed: %s", self._store)
            self.reset()
