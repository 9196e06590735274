"""The lock goes from tenant to tenant, however much one of them asks for."""

import asyncio

import pytest

from app.engine.fair_lock import FairLock
from app.errors import EngineBusy
from app.types import Tenant
from tests.waiting import HANG_SECONDS

ANNA, BERT = Tenant.owner("anna"), Tenant.owner("bert")


class Shop:
    """Serves one at a time, and notes whom."""

    def __init__(self, most: int = 9) -> None:
        self.lock = FairLock(most, "Too many wait.")
        self.served: list[str] = []
        self.open = asyncio.Event()

    def request(self, tenant: Tenant, thing: str) -> asyncio.Task[None]:
        return asyncio.create_task(self._request(tenant, thing))

    async def _request(self, tenant: Tenant, thing: str) -> None:
        async with self.lock.hold(tenant, thing.encode()):
            await self.open.wait()
            self.served.append(thing)


async def test_a_tenant_with_one_wish_does_not_wait_for_all_of_anothers():
    shop = Shop()
    tasks = [shop.request(ANNA, f"a{number}") for number in range(5)]
    await asyncio.sleep(0)
    tasks += [shop.request(BERT, "b0"), shop.request(BERT, "b1")]
    await asyncio.sleep(0)

    shop.open.set()
    await asyncio.gather(*tasks)

    assert ["a0", "a1", "b0", "a2", "b1", "a3", "a4"] == shop.served


async def test_a_tenant_that_waits_for_enough_is_refused_more_and_others_are_not():
    """Several that wait for the same thing count once: the samples of a request have one grammar."""
    shop = Shop(most=2)
    tasks = [shop.request(ANNA, thing) for thing in ("a0", "a1", "a2", "a2", "a1")]
    await asyncio.sleep(0)

    with pytest.raises(EngineBusy):
        await shop.request(ANNA, "a3")
    tasks.append(shop.request(BERT, "b0"))
    await asyncio.sleep(0)
    shop.open.set()
    await asyncio.gather(*tasks)

    assert ["a0", "a1", "a1", "a2", "a2", "b0"] == sorted(shop.served)


@pytest.mark.parametrize("at_once", [False, True])
async def test_whoever_gives_up_neither_keeps_the_turn_nor_takes_anothers(at_once: bool):
    """Also at the moment at which the turn comes."""
    shop = Shop()
    shop.open.set()
    async with shop.lock.hold(ANNA, b"a0"):
        second, third = shop.request(ANNA, "a1"), shop.request(ANNA, "a2")
        await asyncio.sleep(0)
        if not at_once:
            second.cancel()
            await asyncio.sleep(0)
    second.cancel()

    await asyncio.wait_for(third, HANG_SECONDS)
    await asyncio.wait_for(shop.request(BERT, "b0"), HANG_SECONDS)

    assert ["a2", "b0"] == shop.served
    assert second.cancelled()
