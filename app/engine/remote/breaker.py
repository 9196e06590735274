"""The circuit breaker of one upstream: after several failures it gets no requests until a probe has reached it."""

from collections import deque

WINDOW, MOST_FAILURES = 10, 5
"""Of so many requests the last ones count, and with so many failures among them the breaker opens."""


class UpstreamBreaker:
    """Open from the start: nothing is sent before the first probe."""

    def __init__(self) -> None:
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self.is_open = True
        self.failures = 0
        """Of all requests so far, those that failed through no fault of their own."""

    def succeeded(self) -> None:
        """Count a request that was served."""
        self._failed.append(False)

    def failed(self, *, for_certain: bool = False) -> bool:
        """Count a request that failed, and return whether that opened the breaker.

        Args: for_certain: whether the next one would fail, too: nothing listens there.
        """
        self._failed.append(True)
        self.failures += 1
        opens = not self.is_open and (for_certain or sum(self._failed) >= MOST_FAILURES)
        self.is_open = self.is_open or opens
        return opens

    def close(self) -> None:
        """Let requests through: a probe has reached the upstream."""
        if self.is_open:
            self.is_open = False
            self._failed.clear()
