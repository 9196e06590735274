"""What has to be done to the database now and then, apart from any request."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from app.errors import StoreUnavailable


async def every(seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do something for ever, with a pause before each time; an outage of the database only skips a turn."""
    while True:
        await asyncio.sleep(seconds)
        with suppress(StoreUnavailable):
            await work()
