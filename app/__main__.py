"""`python -m app`."""

import signal

# The imports take a second; a Ctrl-C in it ends the process as it ends any other program, without a traceback.
interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

from app.cli import main  # noqa: E402

signal.signal(signal.SIGINT, interrupt)
main()
