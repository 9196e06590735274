"""The worker's signs of life: heartbeats from a thread of their own, and a counter of its progress."""

import os
import time
from contextlib import suppress
from typing import NoReturn

from app.ipc.interpreter import PULSE_BYTES
from app.ipc.liveness import HEARTBEAT_SECONDS


class Progress:
    """Counts parts of the work: steps, and layers where a step may be long."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> None:
        """Report one more part as done."""
        self.count += 1


PROGRESS = Progress()
"""Of this process, which has one model.  The heartbeat starts before there is anything that it could be handed to."""


def beat(pipe: int) -> NoReturn:
    """Write the progress to the parent for ever, whatever the other threads do."""
    while True:
        # What a parent that does not read has no room for is of no use to it later.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(pipe, PROGRESS.count.to_bytes(PULSE_BYTES, "big"))
        time.sleep(HEARTBEAT_SECONDS)
