"""Entry point of the worker process: read the Start message, make sure to exit with the parent, then serve.

Imports torch only after that: it takes seconds, in which the parent may die.
"""

import os
import shutil
import signal
import sys
import threading

import msgspec

from app.ipc.messages import Start


def _exit_with_parent(folder: str) -> None:
    """End this process when the parent's end of standard input closes, even in the middle of a load or a step.

    A parent that was killed could not remove the private folder, so it is removed here.
    """
    # Not `sys.stdin`: a thread that holds its lock would keep the interpreter from ending in order.
    os.read(sys.stdin.fileno(), 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Serve one model until Shutdown."""
    # Some supervisors signal every process of a service: the worker still has to serve while its parent drains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    threading.Thread(target=_exit_with_parent, args=[start.folder], name="exit-with-parent", daemon=True).start()
    from app.worker.process import serve

    serve(start)


if __name__ == "__main__":
    main()
