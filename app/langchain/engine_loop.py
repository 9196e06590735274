"""Hands the work of LangChain's sync methods to the event loop of the engine."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from app.langchain.engine_thread import CLOSED

T = TypeVar("T")


def run(work: Any, loop: asyncio.AbstractEventLoop | None) -> Any:
    """Run a coroutine on the engine's loop and return its result; it is cancelled where the wait is interrupted.

    Raises: RuntimeError: as `submit`.  Whatever the coroutine raises.
    """
    future = submit(work, loop)
    try:
        return future.result()
    except BaseException:
        # Ctrl-C comes to this thread alone.
        future.cancel()
        raise


def drive(stream: AsyncIterator[T], loop: asyncio.AbstractEventLoop | None) -> Iterator[T]:
    """Iterate an async generator of the engine's loop from another thread; leaving early closes it."""
    steps = _Steps(stream)
    try:
        while True:
            try:
                yield run(steps.next(), loop)
            except StopAsyncIteration:
                return
    finally:
        run(steps.close(), loop)


class _Steps(Generic[T]):
    """An async generator on its own loop, of which a step may be broken off."""

    def __init__(self, stream: AsyncIterator[T]) -> None:
        self._stream: Any = stream
        self._step: asyncio.Task[Any] | None = None

    async def next(self) -> T:
        self._step = asyncio.current_task()
        item: T = await anext(self._stream)
        return item

    async def close(self) -> None:
        if self._step is not None and not self._step.done():
            # A generator that runs cannot be closed; one that was interrupted may still clean up.
            if not self._step.cancelling():
                self._step.cancel()
            await asyncio.wait([self._step])
        await self._stream.aclose()


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
