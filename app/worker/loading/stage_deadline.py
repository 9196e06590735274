"""A deadline for the stages of a load that read small files: they never hang, and the error names the stage."""

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

from app.worker.loading.model_files import LoadError

STAGE_SECONDS = 60.0
"""Reading a tokenizer of a million words takes ten."""

_Result = TypeVar("_Result")


def within_deadline(stage: str, work: Callable[[], _Result], seconds: float = STAGE_SECONDS) -> _Result:
    """Return the result of `work`, which runs in a thread that is left behind when it takes too long.

    A C function that keeps the interpreter's lock would keep this thread from noticing: the system then ends the
    process, by SIGVTALRM, after twice as much processor time.

    Raises: LoadError: it took more than `seconds`.  Whatever `work` raises.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name=f"load {stage}", daemon=True)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * seconds)
    try:
        thread.start()
        thread.join(seconds)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if errors:
        raise errors[0]
    if not results:
        raise LoadError(f"its {stage} could not be read within {seconds:g} s")
    return results[0]
