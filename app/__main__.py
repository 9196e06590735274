"""`python -m app`."""

import signal

# The imports take a second; a Ctrl-C in it ends the process as it ends any other program, without a traceback.
interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

from app.garbage import imports_uncollected  # noqa: E402

with imports_uncollected():
    from app.cli import main

signal.signal(signal.SIGINT, interrupt)
main()
