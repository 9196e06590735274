"""A queue in front of the database, written in batches by one task."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import structlog

from app.access.background import BackgroundGroup

RETRY_SECONDS = 1.0
"""Pause before a batch that could not be written is tried again."""
CLOSE_SECONDS = 5.0
"""How long `close` waits for the last batches."""

Item = TypeVar("Item")

_log = structlog.get_logger("llm_service")


class QueuedWriter(Generic[Item]):
    """Takes items without making anybody wait, and writes them in the order of their arrival.

    What arrives while a batch is written goes into the next one together.
    """

    def __init__(
        self,
        write: Callable[[Sequence[Item]], Awaitable[Sequence[Item]]],
        *,
        on_drop: Callable[[Sequence[Item]], None],
        max_batch: int,
        max_waiting: int,
        flush_seconds: float = 0.0,
    ) -> None:
        """Args:
        write: writes a batch and returns those of its items that are to be tried again.
        on_drop: is called with the items that are lost.
        max_waiting: items in the queue; the oldest goes first where there are more.
        flush_seconds: how long the first item of a batch waits for others.
        """
        self._write = write
        self._on_drop = on_drop
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._flush_seconds = flush_seconds
        self._waiting: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    def put(self, item: Item) -> None:
        self._waiting.append(item)
        self._drop_oldest()
        self._arrived.set()

    def start(self, background: BackgroundGroup) -> None:
        self._task = background.spawn(self._run())

    async def close(self) -> None:
        """Write what waits; what the database does not take in time is dropped."""
        self._closing.set()
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_SECONDS)
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._waiting:
            _log.error("Queued writes to the database were lost at the end", items=len(self._waiting))
            self._on_drop(list(self._waiting))
            self._waiting.clear()

    async def _run(self) -> None:
        while not self._closing.is_set() or self._waiting:
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
            if self._flush_seconds:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._flush_seconds):
                        await self._closing.wait()
            while self._waiting:
                if not await self._write_batch():
                    await asyncio.sleep(RETRY_SECONDS)

    async def _write_batch(self) -> bool:
        batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
        try:
            again = await self._write(batch)
        except asyncio.CancelledError:
            self._waiting.extendleft(reversed(batch))
            raise
        except Exception as error:  # noqa: BLE001  # a batch that cannot be written must not stop those behind it
            _log.error("A batch cannot be written to the database", items=len(batch), error=type(error).__name__)
            self._on_drop(batch)
            return True
        self._waiting.extendleft(reversed(again))
        self._drop_oldest()
        return not again

    def _drop_oldest(self) -> None:
        over = len(self._waiting) - self._max_waiting
        if over > 0:
            self._on_drop([self._waiting.popleft() for _ in range(over)])
