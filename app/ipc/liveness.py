"""Decide from outside whether a worker lives: no sign of life, no progress, or well.

Pure: no clock and no process.  `supervisor.py` calls `observe` at short intervals; `interpreter.py` makes the pulses.
"""

from dataclasses import dataclass

HEARTBEAT_SECONDS = 1.0
"""How often a worker shows that it lives, whether it has work or not."""

COMPUTING_SHARE = 0.05
"""Of a processor, that shows that a process computes.  Threads that wait for the interpreter use a little, too: they
look two hundred times a second whether it is free."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Signs of life of a process, as seen from outside; every number only grows."""

    beats: int = 0
    """Messages and heartbeats that arrived.  A thread of its own sends the latter, whatever the model computes."""
    cpu_seconds: float = 0
    """CPU time; 0 where the system does not say.  It grows too while one long call keeps every other thread of the
    interpreter from running, as a heartbeat would need."""
    progress: int = 0
    """Parts of the work done: messages, steps, and layers where a step may be long."""


class Liveness:
    """Counts for how long a worker has shown no sign of life, and for how long no progress in spite of work.

    It counts the time that was observed, in seconds: after the service itself did not run (a suspended laptop, a
    stopped process), what could not be heard meanwhile is not held against the worker.
    """

    def __init__(self) -> None:
        self.silent_seconds = 0.0
        self.stalled_seconds = 0.0
        self._last = Pulse(-1, 0, -1)

    def observe(self, pulse: Pulse, *, busy: bool, seconds: float) -> None:
        """Compare a pulse with the one before.

        Args:
            pulse: the worker's, now.
            busy: whether it has work.
            seconds: since the last call, as far as this process ran in between.
        """
        last, self._last = self._last, pulse
        computed = pulse.cpu_seconds - last.cpu_seconds >= COMPUTING_SHARE * seconds
        heard = (pulse.beats, pulse.progress) != (last.beats, last.progress)
        self.silent_seconds = 0.0 if heard or computed else self.silent_seconds + seconds
        if not busy or pulse.progress != last.progress:
            self.stalled_seconds = 0.0
        elif self.silent_seconds < 2 * HEARTBEAT_SECONDS:
            # A process that is stopped makes no progress either; only one that runs without any is stuck.
            self.stalled_seconds += seconds
