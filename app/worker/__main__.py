"""Entry point of the worker process: make sure to exit with the parent, import torch, read Start, serve.

Called as `app.worker FOLDER [--spare]`; the folder is private to this process and its parent.  The imports take
seconds.  They run in a thread, so that the process notices meanwhile when its parent dies.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import msgspec

from app.garbage import imports_uncollected
from app.ipc.interpreter import SPARE
from app.ipc.messages import Start
from app.ipc.worker_log import RecordFormatter
from app.worker.code_folders import choose_compiler_folders
from app.worker.heartbeat import PROGRESS, beat

_PR_SET_PDEATHSIG = 1
_LOWEST_PRIORITY = 19
_REMOVALS = 50
"""How often it is tried to remove a folder that another thread writes to."""


def _exit_with_parent(folder: str) -> None:
    """End this process when the parent's end of standard input closes, even in the middle of a load or a step."""
    # Not `sys.stdin`: a thread that holds its lock would keep the interpreter from ending in order.
    os.read(sys.stdin.fileno(), 1)
    _exit(folder)


def _exit(folder: str) -> NoReturn:
    """End without a parent, which can no longer remove the private folder."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            break
        # Another thread was writing to it.
        time.sleep(0.02)
    os._exit(0)


def _continue_when_parent_dies() -> None:
    """Have Linux wake this process when its parent dies: a stopped one could not see that its standard input closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _take_standard_output() -> int:
    """Return the pipe to the parent, out of reach of whatever libraries print."""
    pipe = os.dup(sys.stdout.fileno())
    os.set_blocking(pipe, False)  # a parent that is suspended must not hold up anything here
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    return pipe


def _import_worker(spare: bool) -> None:
    if spare and sys.platform == "linux":
        # Of this thread alone; a process without privileges could not raise its priority again.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    with imports_uncollected():
        import app.worker.process  # noqa: F401

    PROGRESS.tick()


def main() -> None:
    """Serve one model until Shutdown."""
    # Some supervisors signal every process of a service: the worker still has to serve while its parent drains.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _continue_when_parent_dies()
    lines = logging.StreamHandler()
    lines.setFormatter(RecordFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    folder = sys.argv[1]
    pipe = _take_standard_output()
    threading.Thread(target=beat, args=[pipe], name="heartbeat", daemon=True).start()
    choose_compiler_folders()
    importing = threading.Thread(target=_import_worker, args=[SPARE in sys.argv], name="import", daemon=True)
    importing.start()
    line = sys.stdin.buffer.readline()
    if not line:
        _exit(folder)
    start = msgspec.json.decode(line, type=Start)
    threading.Thread(target=_exit_with_parent, args=[folder], name="exit-with-parent", daemon=True).start()
    importing.join()
    from app.worker.process import serve

    serve(start)


if __name__ == "__main__":
    main()
