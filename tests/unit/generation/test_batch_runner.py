"""The batch runner: every line has one result, in whatever way its attempts end."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from app.batches import BatchStatus, ClaimedLine
from app.errors import (
    AppError,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    ShuttingDown,
)
from app.generation import batch_runner
from app.generation.batch_runner import MAX_ATTEMPTS
from tests.unit.generation.batches import NOW, Runner


@pytest.fixture
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runner]:
    """A runner that runs, and does not wait as long as one in a service."""
    for name in ("POLL_SECONDS", "RETRY_SECONDS", "MAX_RETRY_SECONDS", "FRESH_SECONDS"):
        monkeypatch.setattr(batch_runner, name, 0.02)
    runner = Runner()
    task = asyncio.create_task(runner.runner.run(runner.routes))
    yield runner
    task.cancel()
    await asyncio.wait([task])


async def test_every_line_of_a_batch_is_answered_once(running: Runner):
    running.create("b", 30)
    await running.until(lambda: running.is_over("b"))
    assert BatchStatus.COMPLETED is running.store.batches["b"].status
    assert [f"b{number}".encode() for number in range(30)] == [
        line.result for line in running.store.lines["b"].values()
    ]
    assert 30 == len(running.routes.answered) == len(set(running.routes.answered))
    assert running.parallel == running.routes.most_running


async def test_tenants_share_what_may_run(running: Runner):
    """A batch of many lines does not make another tenant's wait for all of them."""
    running.routes.gate.clear()
    running.create("a", 100, tenant="a")
    await running.until(lambda: len(running.routes.running) == 4)
    running.create("b", 2, tenant="b")
    running.routes.gate.set()
    await running.until(lambda: running.is_over("a") and running.is_over("b"))
    assert running.routes.answered.index("b1") < 50


async def test_a_file_that_cannot_be_answered_fails_its_batch(running: Runner):
    running.create("b", 1)
    running.files["b"] = b"{"
    await running.until(lambda: running.is_over("b"))
    batch = running.store.batches["b"]
    assert (BatchStatus.FAILED, ["invalid_json_line"]) == (batch.status, [each.code for each in batch.errors])


async def test_a_file_that_was_deleted_fails_its_batch(running: Runner):
    class Gone(dict[str, bytes]):
        def __missing__(self, key: str) -> bytes:
            raise NotFound("gone")

    running.files = Gone()
    running.store.create("b")
    await running.until(lambda: running.is_over("b"))
    assert ["input_file_not_found"] == [each.code for each in running.store.batches["b"].errors]


@pytest.mark.parametrize(
    "error",
    [
        EngineBusy("busy"),
        ShuttingDown(),
        QuotaExceeded("reserved by others", details={"limit": 100, "used": 10, "reserved": 80, "requested": 20}),
    ],
)
async def test_what_may_succeed_later_is_tried_again_as_often_as_it_takes(running: Runner, error: AppError):
    running.routes.errors["b1"] = [error] * (3 * MAX_ATTEMPTS)
    running.create("b", 3)
    await running.until(lambda: running.is_over("b"))
    assert ["completed"] * 3 == running.store.states("b")


@pytest.mark.parametrize("error", [EngineFailed("died"), DeadlineExceeded("slow")])
async def test_what_may_be_the_lines_own_fault_is_tried_a_few_times(running: Runner, error: AppError):
    running.routes.errors |= {"b0": [error] * (MAX_ATTEMPTS - 1), "b1": [error] * MAX_ATTEMPTS}
    running.create("b", 2)
    await running.until(lambda: running.is_over("b"))
    assert ["completed", "failed"] == running.store.states("b")


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("wrong"),
        QuotaExceeded("used up", details={"limit": 100, "used": 90, "reserved": 0, "requested": 20}),
        QuotaExceeded("used up", details={"limit": 100, "used": 100, "reserved": 0}),
    ],
)
async def test_what_will_not_succeed_is_the_lines_result(running: Runner, error: AppError):
    running.routes.errors["b1"] = [error]
    running.create("b", 3)
    await running.until(lambda: running.is_over("b"))
    assert ["completed", "failed", "completed"] == running.store.states("b")
    assert (BatchStatus.COMPLETED, 1) == (running.store.batches["b"].status, running.store.batches["b"].failed)


async def test_a_line_that_ended_its_process_again_and_again_is_not_tried_any_more(running: Runner):
    running.parallel = 0
    running.create("c", 2)
    await running.until(lambda: running.store.batches["c"].status is BatchStatus.IN_PROGRESS)
    line = running.store.lines["c"][1]
    line.attempts = MAX_ATTEMPTS  # as dead processes leave it
    running.parallel = 4
    await running.until(lambda: running.is_over("c"))
    assert b"internal_server_error" == line.result


async def test_a_cancelled_batch_ends_the_lines_that_run(running: Runner):
    running.routes.gate.clear()
    running.create("b", 10)
    await running.until(lambda: len(running.routes.running) == 4)
    running.store.change("b", status=BatchStatus.CANCELLING)
    running.runner.wake()
    await running.until(lambda: running.is_over("b"))
    assert BatchStatus.CANCELLED is running.store.batches["b"].status
    assert (4, ["waiting"] * 10) == (len(running.routes.cancelled), running.store.states("b"))


@pytest.mark.parametrize("status", [BatchStatus.CANCELLING, BatchStatus.FINALIZING])
async def test_lines_of_a_batch_that_is_over_are_cancelled_once(running: Runner, status: BatchStatus):
    """Each gives back what it holds, however often the runner looks at the batch meanwhile."""
    running.routes.gate.clear()
    running.create("b", 10)
    await running.until(lambda: len(running.routes.running) == 4)
    running.store.change("b", status=status)
    running.runner.wake()
    await running.until(lambda: running.is_over("b"))
    assert running.routes.cancelled == running.routes.freed
    assert 4 == len(running.routes.freed)


async def test_a_revoked_key_stops_its_batches_and_no_others(running: Runner):
    running.revoked.add("gone")
    running.create("a", 3, key="gone")
    running.create("b", 3)
    await running.until(lambda: running.is_over("a") and running.is_over("b"))
    revoked = running.store.batches["a"]
    assert (BatchStatus.CANCELLED, ["invalid_api_key"]) == (revoked.status, [each.code for each in revoked.errors])
    assert BatchStatus.COMPLETED is running.store.batches["b"].status
    assert {"k"} == {principal.key_id for principal in running.routes.principals}


async def test_a_batch_whose_time_is_over_says_so_of_each_line_that_is_left(running: Runner):
    running.routes.gate.clear()
    running.create("b", 6)
    await running.until(lambda: len(running.routes.running) == 4)
    running.store.change("b", expires=NOW - timedelta(seconds=1))
    running.runner.wake()
    await running.until(lambda: running.store.batches["b"].status is BatchStatus.EXPIRED)
    running.routes.gate.set()
    await running.until(lambda: not running.routes.running)
    assert {b"expired"} == {line.result for line in running.store.lines["b"].values()}


async def test_lines_that_run_when_it_ends_go_back_to_the_store():
    """As those of a service that is shut down and whose grace period is over; no attempt of theirs is lost."""
    runner = Runner()
    runner.routes.gate.clear()
    task = asyncio.create_task(runner.runner.run(runner.routes))
    runner.create("b", 6)
    await runner.until(lambda: len(runner.routes.running) == 4)
    task.cancel()
    await asyncio.wait([task])
    assert ["waiting"] * 6 == runner.store.states("b")
    assert {0} == {line.attempts for line in runner.store.lines["b"].values()}


@pytest.mark.parametrize("pause", [0, 0.02])
async def test_lines_that_are_claimed_in_the_moment_of_the_end_go_back(pause: float, monkeypatch: pytest.MonkeyPatch):
    """Whether the store is about to say which they are, or their tasks have not begun."""
    runner = Runner()
    claim = runner.store.claim

    async def claim_and_end(*args: Any) -> Sequence[ClaimedLine]:
        found = await claim(*args)
        task.cancel()
        await asyncio.sleep(pause)
        return found

    monkeypatch.setattr(runner.store, "claim", claim_and_end)
    task = asyncio.create_task(runner.runner.run(runner.routes))
    runner.create("b", 6)
    await asyncio.wait([task])
    assert ["waiting"] * 6 == runner.store.states("b")
    assert {0} == {line.attempts for line in runner.store.lines["b"].values()}


async def test_nothing_is_claimed_while_no_model_can_answer(running: Runner):
    running.ready = False
    running.create("b", 2)
    await asyncio.sleep(0.1)
    assert not running.store.lines["b"]
    running.ready = True
    await running.until(lambda: running.is_over("b"))


async def test_an_outage_of_the_store_loses_no_response(running: Runner):
    running.routes.gate.clear()
    running.create("b", 2)
    await running.until(lambda: len(running.routes.running) == 2)
    running.store.down = True
    running.routes.gate.set()
    await running.until(lambda: len(running.routes.answered) == 2)
    await asyncio.sleep(0.1)
    running.store.down = False
    await running.until(lambda: running.is_over("b"))
    assert 2 == len(running.routes.answered)


async def test_the_lease_of_a_line_is_renewed_while_it_runs(running: Runner):
    """However long that takes, nobody else answers it."""
    running.routes.gate.clear()
    running.create("b", 1)
    await running.until(lambda: len(running.routes.running) == 1)
    until = running.store.lines["b"][1].lease
    await running.until(lambda: running.store.lines["b"][1].lease > until)
