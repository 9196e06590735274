"""The tasks that run beside the requests, all in one task group."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from app.errors import StoreUnavailable

_log = structlog.get_logger("llm_service")


class BackgroundGroup:
    """A task group between `start` and `close`; closing cancels what still runs in it."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._owner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        opened: asyncio.Future[asyncio.TaskGroup] = asyncio.get_running_loop().create_future()
        # A group has to be left by the task that entered it, and a lifespan may be closed by another one.
        self._owner = asyncio.create_task(_own(opened))
        self._group = await opened

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the group; one that raises ends the whole group, so it handles its own failures."""
        if self._group is None:
            work.close()
            raise RuntimeError("the background tasks are not started, or closed")
        return self._group.create_task(work)

    async def close(self) -> None:
        self._group = None
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.wait([self._owner])


async def _own(opened: asyncio.Future[asyncio.TaskGroup]) -> None:
    async with asyncio.TaskGroup() as group:
        opened.set_result(group)
        await asyncio.Event().wait()


async def periodic(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do something for ever, with a pause before each time; an outage of the database only skips a turn."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except StoreUnavailable:
            continue
        except Exception as error:  # noqa: BLE001  # the next turn may do better
            _log.error("Housekeeping failed", error=type(error).__name__)
