"""Waits for what another task, thread or process does, and measures, on a machine that may be busy."""

import asyncio
import time
from collections.abc import Callable

HANG_SECONDS = 30.0
"""What has not happened by then never will, however busy the machine is."""
START_SECONDS = 200.0
"""The same for a process that imports much: a service, a worker, a program that uses the library."""


async def until(condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> None:
    """Wait for something that another task does.

    Raises: TimeoutError: it does not happen.
    """
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)


def wait_for(condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> None:
    """Wait for something that another thread or process does; fails the test where it does not happen.

    What may take long is looked for less often: whoever asks a service for it takes time from what it waits for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(seconds / 1000)


def happens(measure: Callable[[], bool], times: int = 6) -> bool:
    """Return whether any of several measurements holds: what else the machine does shows in some, a fault in each."""
    return any(measure() for _ in range(times))
