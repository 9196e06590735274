"""Shows how far the load of a model has come: on a terminal as a bar, else as lines of the log."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import structlog
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.config import ModelConfig
from app.engine.base import LoadProgress

log = structlog.get_logger(__name__)

PATIENCE_SECONDS = 2.0
"""A load that is over by then is not spoken of."""
POLL_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Between two lines of the log about one stage."""
STAGES = {
    "process": "starting a process for it",
    "download": "downloading",
    "files": "finding its files",
    "tokenizer": "reading its tokenizer",
    "weights": "reading its weights",
    "layers": "compiling and measuring its layers for this machine",
    "first token": "computing a first token",
}
"""Stage -> what is done in it; others are shown by their names."""


async def show_loading(model: ModelConfig, progress: Callable[[], LoadProgress | None], terminal: TextIO) -> None:
    """Show the stages of a load, with their bytes where they are counted, until it is over.

    Args:
        progress: how far the load is; None once it is over.
        terminal: where the bar is shown, if it is a terminal.
    """
    if model.source == "hub" and model.engine not in ("echo", "remote"):  # which take no model from anywhere
        log.info("the model is taken from the Hugging Face hub", model=model.name, folder="none of this name here")
    await asyncio.sleep(PATIENCE_SECONDS)
    if terminal.isatty():
        await _show_bar(model.name, progress, Console(file=terminal))
    else:
        await _log_stages(model.name, progress)


@contextmanager
def load_bar(model: str, console: Console, *, disable: bool = False) -> Iterator[Callable[[LoadProgress], None]]:
    """Draw a bar below the block, and give what moves it; each stage has its own, and the last one is shown."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}"), TimeElapsedColumn())
    # What others print meanwhile stays as it is, where rich would break its lines.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False, disable=disable
    ) as bar:
        stages: dict[str, TaskID] = {}

        def show(now: LoadProgress) -> None:
            if now.stage not in stages:
                for before in stages.values():
                    bar.update(before, visible=False)
                what = f"loading {model}: {STAGES.get(now.stage, now.stage)}"
                # A task that had a total keeps it, whatever the next stage has.
                stages[now.stage] = bar.add_task(what, total=None, size="")
            bar.update(stages[now.stage], completed=now.bytes_done or 0, total=now.bytes_total, size=_size(now))

        yield show


async def _show_bar(model: str, progress: Callable[[], LoadProgress | None], console: Console) -> None:
    with load_bar(model, console) as show:
        while (now := progress()) is not None:
            show(now)
            await asyncio.sleep(POLL_SECONDS)


def _size(progress: LoadProgress) -> str:
    if progress.bytes_done is None:
        return ""
    total = "" if progress.bytes_total is None else f" of {decimal(progress.bytes_total)}"
    return f"{decimal(progress.bytes_done)}{total}"


async def _log_stages(model: str, progress: Callable[[], LoadProgress | None]) -> None:
    stage, due = "", 0.0
    while (now := progress()) is not None:
        if now.stage != stage or time.monotonic() >= due:
            stage, due = now.stage, time.monotonic() + LINE_SECONDS
            counted = {"bytes_done": now.bytes_done, "bytes_total": now.bytes_total} if now.bytes_done else {}
            log.info("loading the model", model=model, stage=STAGES.get(stage, stage), **counted)
        await asyncio.sleep(POLL_SECONDS)
