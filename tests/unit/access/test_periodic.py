"""Work that is done now and then."""

import asyncio
from contextlib import suppress

import structlog

from app.access.periodic import every
from app.errors import StoreUnavailable


async def test_a_failure_skips_a_turn_and_only_a_defect_is_told_of():
    """An outage is told of by those who wait for an answer; the next turn comes all the same."""
    outcomes = [StoreUnavailable(), ValueError("canary"), None, None]
    done = asyncio.Event()

    async def work() -> None:
        outcome = outcomes.pop(0)
        if not outcomes:
            done.set()
        if outcome is not None:
            raise outcome

    with structlog.testing.capture_logs() as lines:
        task = asyncio.create_task(every(0.001, work))
        async with asyncio.timeout(5):
            await done.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    assert ["ValueError"] == [line["error"] for line in lines]
    assert "canary" not in str(lines)
