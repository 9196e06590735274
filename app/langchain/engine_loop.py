"""Hands the work of LangChain's sync methods to the event loop of the engine."""

import asyncio
from concurrent.futures import Future
from typing import Any

from app.langchain.engine_thread import CLOSED


def submit(work: Any, loop: asyncio.AbstractEventLoop | None) -> Future[Any]:
    """Run a coroutine on the engine's loop from another thread.

    Raises: RuntimeError: no loop was given, or it is closed, or this is its own thread, where waiting would
        never end.
    """
    try:
        running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if loop is None or running is loop:
        work.close()
        raise RuntimeError(
            "a sync call on the engine's own event loop would wait for itself; use ainvoke, astream or aembed_query"
        )
    if loop.is_closed():
        work.close()
        raise RuntimeError(CLOSED)
    return asyncio.run_coroutine_threadsafe(work, loop)
