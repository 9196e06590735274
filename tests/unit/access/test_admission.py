"""Admission: what is taken when, and that everything comes back exactly once."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.access.admission import AdmissionControl, LimitState
from app.access.background import BackgroundGroup
from app.access.database import Database
from app.access.quotas import Quotas, month_of
from app.config import QuotaConfig
from app.errors import Forbidden, QuotaExceeded, RateLimited
from app.stores.memory_admission import MemoryAdmissionStore
from app.types import Limits, Principal, Rights, Tenant

PRINCIPAL = Principal(
    "k",
    Tenant.owner("t"),
    limits=Limits(monthly_tokens=100, requests_per_minute=60, burst=5, tokens_per_minute=1000, parallel_requests=2),
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Service:
    """Admission over a real quota, and what it has reported."""

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self.refusals = 0
        self.control = self.make()

    def make(self, *, enabled: bool = True) -> AdmissionControl:
        return AdmissionControl(
            MemoryAdmissionStore(clock=Clock()), self.quotas, enabled=enabled, on_refusal=self._refused
        )

    def _refused(self) -> None:
        self.refusals += 1

    async def minute(self) -> tuple[int, int]:
        """Return the requests and the tokens left."""
        return remaining(await self.control.limits(PRINCIPAL))

    async def month(self) -> tuple[int, int]:
        """Return the tokens used and reserved."""
        balance = await self.quotas.balance("k", month_of(datetime.now(UTC)))
        return balance.used, balance.reserved


def remaining(states: Sequence[LimitState]) -> tuple[int, int]:
    left = {state.kind: state.remaining for state in states}
    return left["requests"], left["tokens"]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    database, background = Database(f"sqlite:///{tmp_path / 'service.db'}"), BackgroundGroup()
    await database.migrate()
    await background.start()
    quotas = Quotas(database, QuotaConfig())
    quotas.start(background)
    yield Service(quotas)
    await quotas.close()
    await background.close()
    await database.close()


async def test_a_request_takes_a_place_until_the_context_is_left(service: Service):
    async with service.control.admit(PRINCIPAL) as first, service.control.admit(PRINCIPAL):
        with pytest.raises(RateLimited) as refused:
            async with service.control.admit(PRINCIPAL):
                pass
        assert (4, 1000) == remaining(await first.limits())
    async with service.control.admit(PRINCIPAL):
        pass

    assert 1.0 == refused.value.retry_after
    assert (2, 1000) == await service.minute()
    assert 1 == service.refusals


async def test_a_failure_frees_the_place_and_keeps_the_request_spent(service: Service):
    """A malformed request counts; one that was refused later on is given back."""
    for _ in range(3):
        with pytest.raises(ValueError, match="malformed"):
            async with service.control.admit(PRINCIPAL):
                raise ValueError("malformed")
    async with service.control.admit(PRINCIPAL) as admitted:
        await admitted.refund()
        assert (2, 1000) == remaining(await admitted.limits())

    assert (2, 1000) == await service.minute()


async def test_what_was_not_used_comes_back_in_both(service: Service):
    async with service.control.reserve(PRINCIPAL, 60) as reservation:
        assert (5, 940) == await service.minute()
        assert (0, 60) == await service.month()
        reservation.commit(25)

    assert reservation.counted
    assert (5, 975) == await service.minute()
    assert (25, 0) == await service.month()


async def test_without_a_commit_nothing_counts_whatever_ended_the_generation(service: Service):
    with pytest.raises(ValueError, match="model"):
        async with service.control.reserve(PRINCIPAL, 60):
            raise ValueError("the model failed")

    assert (5, 1000) == await service.minute()
    assert (0, 0) == await service.month()


async def test_a_cancelled_generation_commits_what_it_used(service: Service):
    """Cancelled again while it puts the rest back: that happens all the same, and once."""
    begun = asyncio.Event()

    async def generate() -> None:
        async with service.control.reserve(PRINCIPAL, 60) as reservation:
            reservation.commit(10)
            begun.set()
            await asyncio.sleep(60)

    generating = asyncio.create_task(generate())
    await begun.wait()
    generating.cancel()
    await asyncio.sleep(0)
    generating.cancel()
    await asyncio.wait([generating])

    assert generating.cancelled()
    assert (5, 990) == await service.minute()
    async with asyncio.timeout(5):
        while await service.month() != (10, 0):  # noqa: ASYNC110  # another task's work has no event
            await asyncio.sleep(0.01)


async def test_what_the_quota_refuses_costs_no_minute_tokens(service: Service):
    with pytest.raises(QuotaExceeded) as refused:
        async with service.control.reserve(PRINCIPAL, 101):
            pass

    assert 101 == refused.value.details["requested"]
    assert (5, 1000) == await service.minute()
    assert (0, 0) == await service.month()


async def test_more_than_a_minute_ever_has_is_refused_for_good(service: Service):
    """No time to come back, and it is no refusal for the rate."""
    with pytest.raises(RateLimited) as refused:
        async with service.control.reserve(PRINCIPAL, 1001):
            pass

    assert refused.value.retry_after is None
    assert 0 == service.refusals


async def test_a_month_that_is_used_up_is_refused_on_arrival_and_costs_nothing(service: Service):
    async with service.control.reserve(PRINCIPAL, 100) as reservation:
        reservation.commit(100)

    with pytest.raises(QuotaExceeded) as refused:
        async with service.control.admit(PRINCIPAL):
            pass

    assert (100, 100) == (refused.value.details["limit"], refused.value.details["used"])
    assert "requested" not in refused.value.details
    assert 5 == (await service.minute())[0]
    raised = Principal("k", Tenant.owner("t"), limits=Limits(monthly_tokens=200))
    async with service.control.admit(raised):
        pass


async def test_tokens_that_are_only_reserved_keep_nobody_out(service: Service):
    """They may come back."""
    async with service.control.reserve(PRINCIPAL, 100), service.control.admit(PRINCIPAL):
        pass


async def test_switched_off_rates_leave_the_quota(service: Service):
    control = service.make(enabled=False)
    async with control.admit(PRINCIPAL), control.admit(PRINCIPAL), control.admit(PRINCIPAL) as third:
        assert [] == list(await third.limits())
        async with control.reserve(PRINCIPAL, 60):
            assert (0, 60) == await service.month()


async def test_a_caller_without_limits_is_not_counted(service: Service):
    free = Principal("free", Tenant.owner("t"))
    async with service.control.admit(free) as admitted, service.control.reserve(free, 10**9) as reservation:
        reservation.commit(10**9)

    assert not reservation.counted
    assert [] == list(await admitted.limits())


@pytest.mark.parametrize(
    ("rights", "allowed"),
    [
        (Rights(), True),
        (Rights(models=("m",)), True),
        (Rights(models=()), False),
        (Rights(raw_logprobs=False), False),
        (Rights(system_messages=False), False),
        (Rights(control_tokens=False), False),
    ],
)
def test_a_role_allows_models_logprobs_system_messages_and_control_tokens(
    service: Service, rights: Rights, allowed: bool
):
    principal = Principal("k", Tenant.owner("t"), rights=rights)
    try:
        service.control.check_rights(principal, model="m", logprobs=True, system_messages=True, control_tokens=True)
    except Forbidden:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize("rights", [Rights(control_tokens=False), Rights(system_messages=False)])
def test_whoever_may_send_no_system_message_may_send_no_control_token(service: Service, rights: Rights):
    """Control tokens write a message of any role, so the one right is worth nothing without the other."""
    principal = Principal("k", Tenant.owner("t"), rights=rights)
    uses: dict[str, Any] = {"model": "m", "logprobs": False, "system_messages": False}

    service.control.check_rights(principal, **uses, control_tokens=False)
    with pytest.raises(Forbidden) as refused:
        service.control.check_rights(principal, **uses, control_tokens=True)

    assert "prompt" == refused.value.details["errors"][0]["field"]
