"""How many bytes of a load are done, as the libraries' own progress bars count them."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers.utils import logging as transformers_logging

from app.ipc.messages import Loading
from app.worker.heartbeat import PROGRESS
from app.worker.loading.model_files import weight_files

SECONDS_BETWEEN = 0.2
OnBytes = Callable[[int, int], None]
"""Is called with the bytes that are done and that there are, from any thread."""


class ProgressReporter:
    """Sends the parent how far the load has come, a few times a second."""

    def __init__(self, send: Callable[[Loading], None]) -> None:
        self._send = send
        self._stage = ""
        self._sent_at = 0.0

    def begin(self, stage: str) -> None:
        """Report that a stage begins."""
        self._stage = stage
        self._send(Loading(stage))

    def show(self, done: int, total: int) -> None:
        """Report the bytes of this stage that are done and that there are."""
        PROGRESS.tick()
        if done >= total or time.monotonic() - self._sent_at > SECONDS_BETWEEN:
            self._sent_at = time.monotonic()
            self._send(Loading(self._stage, done, total))


def download_bar(on_bytes: OnBytes) -> type[Any]:
    """Return a class of progress bars for the hub's client, which shows nothing and reports."""

    class Bar(tqdm):  # type: ignore[misc]
        """Counts bytes, or files, which are not reported."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            self._done = options.get("initial") or 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if self._counts_bytes and self.total:
                on_bytes(min(self._done, int(self.total)), int(self.total))
            return None

    return Bar


@contextmanager
def weights_progress(folder: Path, on_bytes: OnBytes) -> Iterator[None]:
    """Report how far transformers has come with the weights of a folder: by the share of their tensors."""
    total = sum(path.stat().st_size for path in weight_files(folder))

    def watch(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Collection) and len(args[0]):
            return _reported(args[0], len(args[0]), total, on_bytes)
        return factory(*args, **options)

    previous = transformers_logging.set_tqdm_hook(watch)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _reported(items: Iterable[Any], count: int, total: int, on_bytes: OnBytes) -> Iterator[Any]:
    for done, item in enumerate(items):
        on_bytes(total * done // count, total)
        yield item
    on_bytes(total, total)
