"""Shows how far the load of the default model has come: on a terminal as a bar, else as lines of the log."""

import asyncio
import time
from collections.abc import Callable
from typing import TextIO

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

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
    if model.source == "hub":
        log.info("the model is taken from the Hugging Face hub", model=model.name, folder="none of this name here")
    await asyncio.sleep(PATIENCE_SECONDS)
    if terminal.isatty():
        await _show_bar(model.name, progress, Console(file=terminal))
    else:
        await _log_stages(model.name, progress)


async def _show_bar(model: str, progress: Callable[[], LoadProgress | None], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        while (now := progress()) is not None:
            what = f"loading {model}: {STAGES.get(now.stage, now.stage)}"
            bar.update(task, description=what, completed=now.bytes_done or 0, total=now.bytes_total)
            await asyncio.sleep(POLL_SECONDS)


async def _log_stages(model: str, progress: Callable[[], LoadProgress | None]) -> None:
    stage, due = "", 0.0
    while (now := progress()) is not None:
        if now.stage != stage or time.monotonic() >= due:
            stage, due = now.stage, time.monotonic() + LINE_SECONDS
            counted = {"bytes_done": now.bytes_done, "bytes_total": now.bytes_total} if now.bytes_done else {}
            log.info("loading the model", model=model, stage=STAGES.get(stage, stage), **counted)
        await asyncio.sleep(POLL_SECONDS)
