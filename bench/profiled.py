"""Run the service so that cProfile can be switched on and off from outside; `bench.profiling` starts it.

    python -m bench.profiled PROFILE serve --port 8000

SIGUSR1 starts the profile of the main thread, SIGUSR2 stops it and writes it to PROFILE.  Seconds are processor time,
so waiting for a socket counts for nothing.
"""

import cProfile
import signal
import sys
import time
from pathlib import Path

from app.cli import main as run_app


def main() -> None:
    """Install the two signals, then run the command line of the service."""
    output = Path(sys.argv.pop(1))
    profile = cProfile.Profile(time.thread_time)

    def finish(*_: object) -> None:
        profile.disable()
        # Whoever waits for the file must not find half of it.
        unfinished = output.with_suffix(".part")
        profile.dump_stats(unfinished)
        unfinished.replace(output)
        profile.clear()

    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())
    signal.signal(signal.SIGUSR2, finish)
    run_app()


if __name__ == "__main__":
    main()
