"""Counts how much happened lately."""

import threading
import time
from collections import deque
from collections.abc import Callable

SECONDS = 60
"""How far back a rate looks."""


class RecentRate:
    """The mean rate of the last minute, counted second by second; safe to call from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock: seconds that never go back."""
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque()
        """The seconds in which something happened, and how much."""
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        now = int(self._clock())
        with self._lock:
            if self._seconds and self._seconds[-1][0] == now:
                count += self._seconds.pop()[1]
            self._seconds.append((now, count))
            self._forget(now)

    def per_second(self) -> float:
        with self._lock:
            self._forget(int(self._clock()))
            return sum(count for _, count in self._seconds) / SECONDS

    def _forget(self, now: int) -> None:
        while self._seconds and self._seconds[0][0] <= now - SECONDS:
            self._seconds.popleft()
