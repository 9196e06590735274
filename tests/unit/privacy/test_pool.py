"""Where long texts are redacted: in processes that may die, in turns that are fair."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from app.errors import ServiceUnavailable
from app.privacy import pool as pool_module
from app.privacy.fair_queue import FairQueue
from app.privacy.filters import InputFilter
from app.privacy.pool import INLINE_CHARS, SEGMENT_CHARS, RedactionFailedError, RedactionPool
from app.privacy.redactor import PiiKind, Redactor, StreamRedactor
from tests.waiting import HANG_SECONDS

CANARY = "jane.doe@example.com"
DIGITS = "12 34 " * (2 * SEGMENT_CHARS // 6)
"""Two steps' worth of text that takes long to scan."""
REDACTOR = Redactor(phone_regions=["US", "DE"])


@pytest.fixture
async def pool() -> AsyncIterator[RedactionPool]:
    pool = RedactionPool(REDACTOR, 1)
    yield pool
    await pool.close()


async def test_ordinary_text_never_leaves_the_process(pool: RedactionPool) -> None:
    """No process is started for a page of prose, nor for a short delta."""
    text = f"Write to {CANARY}. " + "An ordinary sentence of nine words, as people write. " * 80

    assert len(text) < INLINE_CHARS
    assert REDACTOR.redact(text) == await pool.redact("t", text)
    assert "" == await pool.feed("t", StreamRedactor(REDACTOR), "415-555-")
    assert [] == pool.pids


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize(
    "text",
    [
        DIGITS + CANARY,
        # The address lies across the end of the first segment.
        "x " * (SEGMENT_CHARS // 2 - 5) + f"{CANARY} " + "y " * SEGMENT_CHARS,
        "\u200b\ud800 " * SEGMENT_CHARS + CANARY,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0" + "a" * 3 * SEGMENT_CHARS + ". end",
    ],
    ids=["digits", "across segments", "surrogates", "long key"],
)
async def test_a_long_text_is_redacted_as_if_at_once(text: str, processes: int) -> None:
    """In segments, in a process or on the loop: text and counts are those of the whole."""
    pool = RedactionPool(REDACTOR, processes)

    assert REDACTOR.redact(text) == await pool.redact("t", text)

    assert processes == len(pool.pids)
    await pool.close()
    assert [] == pool.pids


async def test_a_long_delta_continues_its_stream_and_is_continued(pool: RedactionPool) -> None:
    """Short deltas on the loop and long ones in the process join to the redacted whole."""
    deltas = ["Mail jane.", "doe@example.com " + DIGITS + "jane@exam", "ple.com"]
    stream = StreamRedactor(REDACTOR)

    parts = [await pool.feed("t", stream, delta) for delta in deltas]

    assert 1 == len(pool.pids)
    assert REDACTOR.redact("".join(deltas)).text == "".join(parts) + stream.finish()
    assert {PiiKind.EMAIL: 2} == stream.counts


async def test_a_killed_process_is_replaced_and_no_text_is_lost(pool: RedactionPool) -> None:
    """Killed while it waits and stopped then killed in the middle of its work."""
    expected = REDACTOR.redact(DIGITS)
    await pool.redact("t", DIGITS)
    (first,) = pool.pids
    os.kill(first, signal.SIGKILL)
    assert expected == await pool.redact("t", DIGITS)
    (second,) = pool.pids

    os.kill(second, signal.SIGSTOP)
    working = asyncio.create_task(pool.redact("t", DIGITS))
    await asyncio.sleep(0.05)
    os.kill(second, signal.SIGKILL)

    assert expected == await working
    (third,) = pool.pids
    assert 3 == len({first, second, third})


async def test_a_process_that_hangs_is_killed(pool: RedactionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time the step is tried in a new one."""
    await pool.redact("t", DIGITS)
    (hanging,) = pool.pids
    os.kill(hanging, signal.SIGSTOP)
    monkeypatch.setattr(pool_module, "STEP_SECONDS", 5.0)

    assert REDACTOR.redact(DIGITS) == await pool.redact("t", DIGITS)
    assert hanging not in pool.pids


@pytest.mark.parametrize("program", ["raise SystemExit", "input(); print('[1]')", "input(); print('nonsense')"])
async def test_without_a_process_that_works_the_filter_refuses(program: str) -> None:
    """Fail closed: 503 for the long text, while short ones are still filtered."""
    pool = RedactionPool(REDACTOR, 1, command=[sys.executable, "-c", program])
    mask = InputFilter(REDACTOR, "mask", lambda kind, count: None, pool=pool)

    with pytest.raises(ServiceUnavailable) as refused:
        await mask.clean("t", [DIGITS + CANARY])
    assert ["[EMAIL]"] == await mask.clean("t", [CANARY])

    assert CANARY not in str(refused.value)
    await pool.close()


async def test_no_program_at_all_refuses_too() -> None:
    pool = RedactionPool(REDACTOR, 1, command=["/nowhere/no-such-program"])

    with pytest.raises(RedactionFailedError):
        await pool.redact("t", DIGITS)
    await pool.close()


async def test_a_process_ends_with_the_service_that_started_it() -> None:
    """Its standard input ends then, however the service did."""
    command = (sys.executable, "-m", "app.privacy.redaction_process", "email", "US")
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()

    assert 0 == await asyncio.wait_for(process.wait(), HANG_SECONDS)


async def test_a_text_given_up_leaves_the_pool_of_use(pool: RedactionPool) -> None:
    """A client that hangs up while its text waits or is worked on costs others nothing."""
    await pool.redact("t", DIGITS)
    leaving = [asyncio.create_task(pool.redact("t", DIGITS)) for _ in range(5)]
    await asyncio.sleep(0.001)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)

    assert REDACTOR.redact(DIGITS) == await pool.redact("t", DIGITS)


async def test_closing_ends_what_waits(pool: RedactionPool) -> None:
    """Nobody waits for ever, and a closed pool takes nothing more."""
    waiting = [asyncio.create_task(pool.redact("t", DIGITS)) for _ in range(3)]
    await asyncio.sleep(0)
    await pool.close()

    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, RedactionFailedError)
    with pytest.raises(RedactionFailedError):
        await pool.redact("t", DIGITS)


async def test_a_long_text_waits_for_one_piece_of_another_tenant_and_not_for_all(pool: RedactionPool) -> None:
    """Behind thirty long texts of one tenant the first of another is done among the first."""
    await pool.redact("quiet", DIGITS)
    done: list[str] = []

    async def redact(tenant: str) -> None:
        await pool.redact(tenant, DIGITS)
        done.append(tenant)

    loud = [asyncio.create_task(redact("loud")) for _ in range(30)]
    await asyncio.sleep(0)  # they wait in the queue
    await redact("quiet")
    await asyncio.gather(*loud)

    assert done.index("quiet") < 15


async def order(*items: tuple[str, float]) -> list[str]:
    queue: FairQueue[str] = FairQueue()
    for tenant, work in items:
        queue.put(tenant, work, tenant)
    return [await queue.get() for _ in items]


async def test_turns_go_by_work_and_not_by_items() -> None:
    """A tenant with items ten times as large gets a tenth as many turns."""
    turns = await order(*[("large", 10)] * 10, *[("small", 1)] * 100)

    places = [at for at, tenant in enumerate(turns) if tenant == "large"]
    assert all(9 <= after - before <= 12 for before, after in pairwise(places))


async def test_a_tenant_that_was_idle_neither_waits_nor_saves_up() -> None:
    """It takes turns with the others from where they are."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.put("busy", 1, "busy")
    for _ in range(10):
        await queue.get()
    for _ in range(5):
        queue.put("idle", 1, "idle")

    turns = [await queue.get() for _ in range(15)]

    assert 5 == turns[:11].count("idle") or 5 == turns[:10].count("idle")
    assert 0 < turns[:4].count("busy")
    assert 0 == len(queue)


async def test_tenants_without_a_backlog_are_forgotten() -> None:
    """A queue that thousands have used, and that was never empty, remembers the turns of a few."""
    queue: FairQueue[str] = FairQueue()
    queue.put("always", 1, "always")
    for tenant in range(5000):
        queue.put(tenant, 1, "once")
        if "always" == await queue.get():
            queue.put("always", 1, "always")
            await queue.get()

    assert queue.tenants < 200
