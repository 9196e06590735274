"""What refused requests may cost the service: a key that is refused again and again has to wait before it is heard.

Each refusal costs units of a budget that refills steadily, as many as it took work.  A key whose budget is overdrawn
waits at its next request until that is paid, and its requests pass one after the other.  A client that waits as
`Retry-After` says never overdraws it.
"""

import time
from collections.abc import Callable
from enum import IntEnum

from cachetools import LRUCache

MAX_REMEMBERED = 10_000
"""Keys whose budget is remembered."""


class RefusalCost(IntEnum):
    """Units that a refusal takes."""

    EARLY = 1
    """Refused by the key alone: before anything of the body was read."""
    BUSY = 4
    """Refused by the engine, for each of the answers that it was to generate."""
    LATE = 32
    """Refused for its tokens, once the prompt was filtered and encoded."""


class RefusalBudget:
    """The budgets of all keys, in this process: it is this process's work that they limit."""

    def __init__(
        self,
        *,
        units: float = 256,
        per_second: float = 50,
        most_seconds: float = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        units: of a full budget.
        per_second: units that come back in a second.
        most_seconds: nobody waits longer than this.
        clock: seconds that never go back.
        """
        self._units = units
        self._per_second = per_second
        self._least = -most_seconds * per_second
        self._clock = clock
        self._levels: LRUCache[str, tuple[float, float]] = LRUCache(MAX_REMEMBERED)
        """Key id -> (units, when they were counted); a full budget is not remembered."""

    def charge(self, key_id: str, units: float) -> None:
        """Take units for a refusal, more than there are if need be."""
        self._levels[key_id] = max(self._level(key_id) - units, self._least), self._clock()

    def seconds_to_wait(self, key_id: str) -> float:
        """Return how long a request has to wait that arrives now, and let the next one wait a little longer."""
        overdrawn = -self._level(key_id)
        if overdrawn <= 0:
            return 0.0
        self.charge(key_id, RefusalCost.EARLY)
        return overdrawn / self._per_second

    def _level(self, key_id: str) -> float:
        units, counted = self._levels.get(key_id, (self._units, 0.0))
        return min(self._units, units + (self._clock() - counted) * self._per_second)
