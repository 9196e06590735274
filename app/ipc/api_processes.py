"""Keeps several API processes running on one socket: passes signals on, and starts one that dies again.

`server.py` says what one is and how it is started.
"""

import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType

import structlog

RESTART_SECONDS = 1.0
"""Pause before one that died is started again, so that one that always dies does not take a processor."""

log = structlog.get_logger(__name__)


class ApiProcesses:
    """So many processes, until a signal or one that ends by itself with an error: it could not start."""

    def __init__(self, start: Callable[[int], SpawnProcess], count: int) -> None:
        """Args: start: starts one; takes its number, from 0."""
        self._start = start
        self._running: dict[int, SpawnProcess] = {number: start(number) for number in range(count)}
        self._stopping = False
        self._code = 0

    def run(self) -> int:
        """Wait for all of them to end, and return the exit code."""
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._pass_on)
        while self._running:
            wait([process.sentinel for process in self._running.values()])
            for number, process in list(self._running.items()):
                if process.exitcode is not None:
                    del self._running[number]
                    self._ended(number, process.exitcode)
        return self._code

    def _ended(self, number: int, code: int) -> None:
        if code > 0:
            self._code = self._code or code
            self._stop()
        elif not self._stopping:
            log.error("an API process died and is started again", number=number, code=code)
            time.sleep(RESTART_SECONDS)
            # A signal may have come meanwhile.
            if not self._stopping:
                self._running[number] = self._start(number)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        """Let all of them drain; the second time they end at once."""
        self._stopping = True
        for process in self._running.values():
            process.terminate()
