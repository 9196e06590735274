"""The circuit breaker of the database: while it is known to be away, requests fail at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.errors import StoreUnavailable

PROBE_SECONDS = 1.0
"""Pause between two attempts to reach a database that was away."""

log = logging.getLogger(__name__)


class CircuitBreaker:
    """Shared by everything that waits for one database.

    Callers with a fallback look at `degraded` and use it at the first sign of trouble; callers that would have to
    refuse their request look at `open`.  Any transaction that succeeds closes the breaker, and while it is not closed a
    probe tries one now and then, so that no request has to.
    """

    def __init__(self, probe: Callable[[], Awaitable[object]], *, probe_seconds: float = PROBE_SECONDS) -> None:
        """Args: probe: a short transaction; raises StoreUnavailable if the database does not answer."""
        self._probe = probe
        self._probe_seconds = probe_seconds
        self._degraded = asyncio.Event()
        self.open = False
        """Whether the last attempt failed."""

    @property
    def degraded(self) -> bool:
        """Whether the breaker is open, or somebody gave up waiting early."""
        return self._degraded.is_set()

    def slow(self) -> None:
        """Note that somebody gave up waiting before the database's own time was over."""
        self._degraded.set()

    def trip(self) -> None:
        """Open: the database failed, or did not answer in its time."""
        self.open = True
        self._degraded.set()

    def reset(self) -> None:
        """Close: the database answers."""
        self.open = False
        self._degraded.clear()

    async def watch(self) -> None:
        """Probe for ever, while the breaker is not closed."""
        while True:
            await self._degraded.wait()
            await asyncio.sleep(self._probe_seconds)
            if not self.degraded:
                continue
            try:
                await self._probe()
            except StoreUnavailable:
                self.trip()
                continue
            except Exception:
                # It answers; whatever is wrong beyond that, the requests themselves report.
                log.exception("the probe of the database failed")
            self.reset()
