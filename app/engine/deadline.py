"""A time limit whose end is an error that a client may see."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.errors import DeadlineExceeded


@asynccontextmanager
async def deadline(seconds: float, message: str) -> AsyncIterator[None]:
    """Raises: DeadlineExceeded: the block took longer than so many seconds."""
    limit = asyncio.timeout(max(0.0, seconds))
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(message) from None
