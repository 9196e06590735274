"""When an object that requests hold is free again."""

import asyncio

import pytest

from app.engine.leases import Leases

SOON = 5.0


async def test_a_wait_ends_with_the_last_lease_of_its_object() -> None:
    leases = Leases[str]()
    with leases.lease("model", ("a-0", "a-1")):
        with leases.lease("model", ("b",)):
            wait = asyncio.create_task(leases.wait_released(SOON, "model"))
            assert ["a-0", "a-1", "b"] == leases.request_ids("model")
        await asyncio.sleep(0)
        assert not wait.done()

    assert await wait
    assert not leases.is_leased("model")


async def test_two_objects_that_are_equal_are_told_apart() -> None:
    """A model that is drained and the one that has taken its place may be equal in every field."""
    leases = Leases[list[str]]()
    old, new = ["model"], ["model"]
    with leases.lease(new, ("a",)):
        assert await leases.wait_released(SOON, old)
        assert not await leases.wait_released(0.01)

        assert [] == leases.request_ids(old)


async def test_a_lease_ends_with_an_error() -> None:
    leases = Leases[str]()
    with pytest.raises(RuntimeError), leases.lease("model", ("a",)):
        raise RuntimeError

    assert not leases.is_leased("model")
    assert await leases.wait_released(SOON)


async def test_waits_that_are_ended_report_what_is_still_leased() -> None:
    leases = Leases[str]()
    with leases.lease("model", ("a",)):
        wait = asyncio.create_task(leases.wait_released(60, "model"))
        await asyncio.sleep(0)
        leases.end_waits()

        assert not await asyncio.wait_for(wait, SOON)
        assert not await asyncio.wait_for(leases.wait_released(60), SOON)
