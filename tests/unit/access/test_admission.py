"""Admission: what is taken when, and that everything comes back exactly once."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.access import ledger, quotas
from app.access.admission import PLACE_BYTES, AdmissionControl, LimitState
from app.access.background import BackgroundGroup
from app.access.database import Database
from app.access.ledger import Balance, Month
from app.access.quotas import Quotas, month_of
from app.access.refusals import RefusalBudget, RefusalCost
from app.config import QuotaConfig
from app.errors import AppError, EngineBusy, EngineFailed, Forbidden, QuotaExceeded, RateLimited, ServiceUnavailable
from app.stores.memory_admission import MemoryAdmissionStore
from app.types import Limits, Principal, Rights, Tenant
from tests.waiting import HANG_SECONDS

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
        self.limits: list[str] = []
        """Those that refused a request."""
        self.control = self.make()

    def make(self, **options: Any) -> AdmissionControl:
        return AdmissionControl(MemoryAdmissionStore(clock=Clock()), self.quotas, on_refusal=self._refused, **options)

    def _refused(self, limit: str) -> None:
        self.limits.append(limit)

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
    """Whoever finds none has spent a request, and is told when there is one again."""
    async with service.control.admit(PRINCIPAL) as first, service.control.admit(PRINCIPAL):
        with pytest.raises(RateLimited) as refused:
            async with service.control.admit(PRINCIPAL):
                pass
        assert (4, 1000) == remaining(await first.limits())
    async with service.control.admit(PRINCIPAL):
        pass

    assert 1.0 == refused.value.retry_after
    assert (1, 1000) == await service.minute()
    assert ["parallel"] == service.limits


async def test_a_failure_frees_the_place_and_keeps_the_request_spent(service: Service):
    for _ in range(3):
        with pytest.raises(ValueError, match="malformed"):
            async with service.control.admit(PRINCIPAL):
                raise ValueError("malformed")

    assert (2, 1000) == await service.minute()


async def test_who_is_refused_for_its_tokens_learns_when_it_has_a_request_again(service: Service):
    """A refused request costs one; the time to come back covers that, and a client that waits gets through."""
    limits = Limits(requests_per_minute=6, burst=1, tokens_per_minute=6000)
    caller = Principal("k", Tenant.owner("t"), limits=limits)
    clock = Clock()
    control = AdmissionControl(MemoryAdmissionStore(clock=clock), service.quotas, on_refusal=lambda limit: None)
    async with control.admit(caller) as admitted, control.reserve(caller, 6000) as reservation:
        reservation.commit(6000)
    clock.now += 10
    async with control.admit(caller) as admitted:
        with pytest.raises(RateLimited) as refused:
            async with control.reserve(caller, 1100):
                pass
        without_the_request = refused.value.retry_after
        admitted.refuse(refused.value)
    clock.now += refused.value.retry_after or 0

    assert (1.0, 10.0) == (without_the_request, refused.value.retry_after)
    async with control.admit(caller), control.reserve(caller, 1100):
        pass


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
    async with asyncio.timeout(HANG_SECONDS):
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
    assert [] == service.limits


async def test_a_month_that_is_used_up_is_refused_on_arrival_and_costs_a_request(service: Service):
    """Also one with a single token left: no request takes fewer than two."""
    async with service.control.reserve(PRINCIPAL, 100) as reservation:
        reservation.commit(99)

    with pytest.raises(QuotaExceeded) as refused:
        async with service.control.admit(PRINCIPAL):
            pass

    assert (100, 99) == (refused.value.details["limit"], refused.value.details["used"])
    assert "requested" not in refused.value.details
    assert ["quota"] == service.limits
    assert 4 == (await service.minute())[0]
    raised = Principal("k", Tenant.owner("t"), limits=Limits(monthly_tokens=200))
    async with service.control.admit(raised):
        pass


async def test_a_request_that_cannot_fit_the_month_is_refused_before_it_is_prepared(service: Service):
    """By the fewest tokens that it can take, and without a query for each refusal."""
    async with service.control.reserve(PRINCIPAL, 100) as reservation:
        reservation.commit(90)
    queries = 0
    balance = ledger.balance

    async def counted(database: Database, counter: Month) -> Balance:
        nonlocal queries
        queries += 1
        return await balance(database, counter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "balance", counted)
        patch.setattr(quotas, "CHECK_SECONDS", 600)
        for _ in range(49):
            with pytest.raises(QuotaExceeded):
                await service.control.check_tokens(PRINCIPAL, 11)
        with pytest.raises(QuotaExceeded) as refused:
            await service.control.check_tokens(PRINCIPAL, 11)
        await service.control.check_tokens(PRINCIPAL, 10)

    assert (90, 11) == (refused.value.details["used"], refused.value.details["requested"])
    assert 1 == queries


async def test_many_requests_of_a_used_up_month_query_the_database_once(service: Service, monkeypatch: Any):
    """All that wait for the answer share it, and the query goes on if the first of them leaves."""
    async with service.control.reserve(PRINCIPAL, 99) as reservation:
        reservation.commit(99)
    queries, answer = 0, asyncio.Event()
    balance = ledger.balance

    async def counting(database: Database, counter: Month) -> Balance:
        nonlocal queries
        queries += 1
        await answer.wait()
        return await balance(database, counter)

    monkeypatch.setattr(ledger, "balance", counting)
    first, *others = [asyncio.create_task(service.control.check_tokens(PRINCIPAL, 2)) for _ in range(50)]
    await asyncio.sleep(0)
    first.cancel()
    answer.set()
    outcomes = await asyncio.gather(*others, return_exceptions=True)

    assert [QuotaExceeded] * 49 == [type(each) for each in outcomes]
    assert first.cancelled()
    assert 1 == queries


async def test_a_key_that_is_refused_again_and_again_waits_and_no_other_does(service: Service):
    """Then its requests pass one after the other; whoever stops sending so is heard at once again."""
    clock, caller, other = Clock(), Principal("k", Tenant.owner("t")), Principal("other", Tenant.owner("t"))
    budget = RefusalBudget(units=64, per_second=10, most_seconds=5, clock=clock)
    control = service.make(refusals=budget)
    for _ in range(2):
        async with control.admit(caller) as admitted:
            admitted.refuse(QuotaExceeded("Used up."))
    assert 0 == budget.seconds_to_wait("k")
    for _ in range(2):
        budget.charge("k", RefusalCost.LATE)

    waits = [budget.seconds_to_wait("k") for _ in range(3)]
    assert [5.0, 5.0, 5.0] == waits  # nobody waits longer
    clock.now += 4
    assert [1.0, 1.1, 1.2] == pytest.approx([budget.seconds_to_wait("k") for _ in range(3)])
    assert 0 == budget.seconds_to_wait("other")
    async with asyncio.timeout(4), control.admit(other):
        pass
    clock.now += 60
    assert 0 == budget.seconds_to_wait("k")


@pytest.mark.parametrize(
    ("error", "answers", "units"),
    [
        (EngineBusy("Full."), 1, 4),
        (EngineBusy("Full."), 8, 32),
        (EngineBusy("Full."), 64, 64),
        (QuotaExceeded("Used up."), 1, 32),
        (RateLimited("Too many tokens."), 1, 32),
        (EngineFailed("It died."), 8, 0),
    ],
    ids=["busy", "busy for 8", "busy for a batch", "quota", "rate", "no refusal"],
)
async def test_a_refusal_costs_what_it_took(service: Service, error: AppError, answers: int, units: int):
    """What is to be generated counts where the engine refuses it."""
    budget = RefusalBudget(units=0, per_second=1, most_seconds=1000, clock=Clock())
    async with service.make(refusals=budget).admit(Principal("k", Tenant.owner("t"))) as admitted:
        admitted.expect(answers)
        admitted.refuse(error)

    assert units == budget.seconds_to_wait("k")


async def test_one_tenant_cannot_occupy_all_places_of_the_process(service: Service):
    """Answers and parts of bodies take places; another tenant finds some, and all are free again at the end."""
    control = service.make(places=8)
    greedy, other = Principal("k", Tenant.owner("greedy")), Principal("o", Tenant.owner("other"))
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(control.admit(greedy, 3 * PLACE_BYTES))
        first.expect(7)
        second = await stack.enter_async_context(control.admit(greedy))
        for attempt in (lambda: second.expect(2), lambda: first.expect(8)):
            with pytest.raises(RateLimited) as refused:
                attempt()
            assert 1 == refused.value.retry_after
        with pytest.raises(RateLimited):
            async with control.admit(greedy, 50):
                pass
        newcomer = await stack.enter_async_context(control.admit(other))
        newcomer.expect(4)
        with pytest.raises(RateLimited):
            async with control.admit(other, 5 * PLACE_BYTES):
                pass

    async with control.admit(greedy) as again:
        again.expect(8)


async def test_a_tenant_that_keeps_sending_while_it_has_no_place_is_slowed_down(service: Service):
    """Each of its refusals is counted, and costs it as one by any other limit."""
    clock, caller = Clock(), Principal("k", Tenant.owner("t"))
    budget = RefusalBudget(units=3, per_second=100, clock=clock)
    control = service.make(places=1, refusals=budget)
    took = []
    async with control.admit(caller) as admitted:
        for _ in range(8):
            began = time.monotonic()
            with pytest.raises(RateLimited):
                async with control.admit(caller):
                    pass
            took.append(time.monotonic() - began)
        with pytest.raises(RateLimited):
            async with control.admit(Principal("k2", Tenant.owner("t"))):
                pass
        refusals = service.limits.count("places")
        with pytest.raises(ServiceUnavailable):
            admitted.expect(2)

    assert (9, 9) == (refusals, len(service.limits))
    assert took[-1] >= 0.09  # nine units at a hundred a second
    assert budget.seconds_to_wait("k") > 0
    assert 0 == budget.seconds_to_wait("k2")


async def test_tokens_that_are_only_reserved_keep_nobody_out(service: Service):
    """They may come back."""
    async with service.control.reserve(PRINCIPAL, 100), service.control.admit(PRINCIPAL):
        pass


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
        service.control.check_rights(principal, model="m", logprobs=True, system_text="messages", control_tokens=True)
    except Forbidden:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize("rights", [Rights(control_tokens=False), Rights(system_messages=False)])
def test_whoever_may_send_no_system_message_may_send_no_control_token(service: Service, rights: Rights):
    """Control tokens write a message of any role, so the one right is worth nothing without the other."""
    principal = Principal("k", Tenant.owner("t"), rights=rights)
    uses: dict[str, Any] = {"model": "m", "logprobs": False, "system_text": None}

    service.control.check_rights(principal, **uses, control_tokens=False)
    with pytest.raises(Forbidden) as refused:
        service.control.check_rights(principal, **uses, control_tokens=True)

    assert "prompt" == refused.value.details["errors"][0]["field"]


async def test_a_bound_is_set_aside_where_it_is_left_and_the_count_where_it_is_not(service: Service):
    """The prompt is counted only in the latter case; what is lowered is free again while the request runs."""
    caller = Principal("k", Tenant.owner("t"), limits=Limits(tokens_per_minute=1000, requests_per_minute=9))
    counted = 0

    async def count() -> int:
        nonlocal counted
        counted += 1
        return 300

    async def left() -> int:
        return remaining(await service.control.limits(caller))[1]

    async with service.control.reserve(caller, 800, count) as first:
        async with service.control.reserve(caller, 800, count_of(150)):
            assert 50 == await left()
        await first.lower(300)
        assert 700 == await left()
        async with service.control.reserve(caller, 800, count):
            assert (1, 400) == (counted, await left())
        first.commit(250)
    assert 750 == await left()
    with pytest.raises(RateLimited):
        async with service.control.reserve(caller, 2000, count_of(751)):
            pass
    assert (750, ["tokens"]) == (await left(), service.limits)


async def test_a_quota_reserves_what_was_counted(service: Service):
    """Its reservations are rows of the database, which stay as they are until the request has ended."""
    async with service.control.reserve(PRINCIPAL, 900, count_of(60)):
        assert (0, 60) == await service.month()
        assert (5, 940) == await service.minute()


def count_of(tokens: int) -> Callable[[], Awaitable[int]]:
    async def count() -> int:
        return tokens

    return count
