"""Tenants share a capacity: one without competitors has its setting's worth, and none can keep a newcomer out."""

from hypothesis import given
from hypothesis import strategies as st

from app.fair_share import FairPlaces, fits_share
from app.types import Tenant

GREEDY, NEWCOMER = Tenant.owner("greedy"), Tenant.owner("newcomer")


@given(st.integers(1, 200))
def test_without_competitors_a_tenant_has_exactly_what_the_setting_says(most: int):
    held = 0
    while fits_share(1, held=held, total=held, most=most):
        held += 1

    assert most == held


@given(st.integers(1, 6), st.integers(8, 100))
def test_tenants_that_take_all_they_can_get_have_equal_parts_and_leave_one_free(tenants: int, most: int):
    """Taking turns, each of N has about an (N+1)th of twice the setting, and as much is free."""
    held, growing = [0] * tenants, True
    while growing:
        growing = False
        for index in range(tenants):
            if fits_share(1, held=held[index], total=sum(held), most=most):
                held[index] += 1
                growing = True

    part = 2 * most / (tenants + 1)
    assert max(held) - min(held) <= 1
    assert abs(held[0] - part) <= 1
    assert 2 * most - sum(held) >= part - tenants


TENANTS = st.sampled_from([Tenant.key(name) for name in "abcdef"])


@given(st.lists(st.tuples(TENANTS, st.integers(1, 8), st.booleans()), max_size=80), st.integers(1, 30))
def test_whatever_the_others_hold_a_tenant_without_a_place_gets_one(
    attempts: list[tuple[Tenant, int, bool]], most: int
):
    """Places come and go; nobody holds more than the setting, but for a first request that takes more by itself."""
    places, held = FairPlaces(most), dict.fromkeys([Tenant.key(name) for name in "abcdef"], 0)
    for tenant, count, leaves in attempts:
        if leaves:
            places.release(tenant, held[tenant])
            held[tenant] = 0
        else:
            taken = places.take(tenant, count)
            assert taken or held[tenant]
            assert not taken or held[tenant] + count <= max(most, count)
            held[tenant] += count * taken
        assert held[tenant] == places.held(tenant)
    assert places.take(NEWCOMER, 1)


def test_a_tenant_that_has_its_part_waits_while_another_has_less():
    """What is freed is for those who have less, until all have the same."""
    places = FairPlaces(12)
    assert places.take(GREEDY, 12)
    assert not places.take(GREEDY, 1)
    assert places.take(NEWCOMER, 4)
    places.release(GREEDY, 2)

    assert not places.take(GREEDY, 1)
    assert places.take(NEWCOMER, 4)
