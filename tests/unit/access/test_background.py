"""The tasks beside the requests, and what is done now and then."""

import asyncio
from contextlib import suppress

import pytest
import structlog

from app.access.background import BackgroundGroup, periodic
from app.errors import StoreUnavailable
from tests.waiting import HANG_SECONDS


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
        task = asyncio.create_task(periodic(0.001, work))
        async with asyncio.timeout(HANG_SECONDS):
            await done.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    assert ["ValueError"] == [line["error"] for line in lines]
    assert "canary" not in str(lines)


async def test_closing_ends_what_still_runs_and_takes_nothing_more():
    """Whichever task closes it: a lifespan may end in another one than it began in."""
    group = BackgroundGroup()
    await asyncio.create_task(group.start())
    task = group.spawn(periodic(60, group.close))

    await asyncio.create_task(group.close())

    assert task.cancelled()
    with pytest.raises(RuntimeError):
        group.spawn(periodic(60, group.close))


async def test_nothing_is_spawned_before_the_start():
    with pytest.raises(RuntimeError, match="started"):
        BackgroundGroup().spawn(periodic(60, BackgroundGroup().close))
