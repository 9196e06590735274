"""What has to be done to the database now and then, apart from any request."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from app.errors import StoreUnavailable

_log = structlog.get_logger("llm_service")


async def every(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do something for ever, with a pause before each time; an outage of the database only skips a turn."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except StoreUnavailable:
            continue
        except Exception as error:  # noqa: BLE001  # the next turn may do better
            _log.error("Housekeeping failed", error=type(error).__name__)
