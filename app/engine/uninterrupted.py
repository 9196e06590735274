"""Work that a cancellation does not leave half done."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await some work to its end, and only then raise a cancellation that came meanwhile, however often.

    The work must be sure to end.  Raises: whatever it raises.
    """
    task, cancellation = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        task.result()
        return
    # Retrieves an error, which would be logged otherwise.
    raise cancellation from None if task.cancelled() else task.exception()
