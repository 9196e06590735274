"""What a load logs, for the parent's log: a line each; warnings from whichever library, and what is our own."""

import logging
from collections import deque
from collections.abc import Callable

from transformers.utils import logging as transformers_logging

from app.ipc.messages import Logged
from app.worker.loading.model_files import one_line

MAX_LINE_CHARS = 500
MAX_LINES = 50
"""Lines of one load that are kept; a library may repeat one for each of a thousand tensors."""
_OWN = "app"
"""The logger above all of the service's own."""


class LoadLog(logging.Handler):
    """Collects lines until `flush_to` hands them over; the thread that owns the socket calls it.

    Of libraries only warnings: what they say below may hold texts.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[Logged] = deque()
        self._seen: set[str] = set()

    def __enter__(self) -> "LoadLog":
        """Take over what is logged, in place of standard error."""
        transformers_logging.disable_default_handler()
        transformers_logging.enable_propagation()
        transformers_logging.set_verbosity_warning()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.captureWarnings(True)
        root = logging.getLogger()
        self._replaced = root.handlers[:]
        root.handlers[:] = [self]
        own = logging.getLogger(_OWN)
        self._level = own.level
        own.setLevel(logging.INFO)
        return self

    def __exit__(self, *error: object) -> None:
        """Let warnings go to standard error again."""
        logging.getLogger(_OWN).setLevel(self._level)
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.captureWarnings(False)
        logging.getLogger().handlers[:] = self._replaced

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record as one line, once; a report that the loader itself reads is left out."""
        if record.levelno < logging.WARNING and not record.name.startswith(f"{_OWN}."):
            return
        line = one_line(self.format(record), MAX_LINE_CHARS)
        if "LOAD REPORT" not in line and line not in self._seen and len(self._seen) < MAX_LINES:
            self._seen.add(line)
            self._lines.append(Logged(record.levelno, line))

    def flush_to(self, send: Callable[[Logged], None]) -> None:
        """Call `send` with each line since the last time."""
        while self._lines:
            send(self._lines.popleft())
