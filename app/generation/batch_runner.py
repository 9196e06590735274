"""Answers the lines of batches beside live traffic: a few at once, each claimed in the store before it is run.

What a line asks for and how its response looks is its route's affair (`LineRoutes`); what is stored, and that no line
has two results, is the store's (`BatchStore`, `BatchLines`).  This decides what runs next, and what becomes of a line
that was refused: one that may succeed later goes back to the store, every other outcome is its result.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import uuid4

import structlog

from app.batches import Batch, BatchCounts, BatchError, BatchStatus, ClaimedLine
from app.config import BatchesConfig
from app.errors import (
    AppError,
    DeadlineExceeded,
    EngineFailed,
    InternalError,
    NotFound,
    QuotaExceeded,
    RateLimited,
    ServiceUnavailable,
    StoreUnavailable,
)
from app.generation.batch_input import BatchInput, InvalidBatch
from app.generation.batch_ports import BatchLines, BatchStore, LineOutcome, LineRoutes
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import Principal

POLL_SECONDS = 2.0
"""How soon a process notices what another has changed in the store."""
RETRY_SECONDS = 1.0
"""Pause after a refusal that says no time of its own, and between two attempts to reach the store."""
MAX_RETRY_SECONDS = 30.0
COUNT_SECONDS = 10.0
"""How old the counts of batches and lines may be."""
MAX_ATTEMPTS = 5
"""Attempts of a line that ended with the process that ran it, or with a failure that it may have caused itself."""
GIVEN_UP_AT_ONCE = 500
FRESH_SECONDS = 2.0
"""How long a key that was found good counts as good."""

_NO_FILE = BatchError("input_file_not_found", "The file of the batch was deleted before it was validated.")
_NOT_ALLOWED = BatchError("invalid_api_key", "The API key that created the batch is revoked or has expired.")
_T = TypeVar("_T")

_log = structlog.get_logger("llm_service")


class BatchRunner:
    """Runs batches for as long as `run` does."""

    def __init__(
        self,
        batches: BatchStore,
        lines: BatchLines,
        *,
        content: Callable[[Batch], AsyncIterator[bytes]],
        principal_of: Callable[[str], Awaitable[Principal | None]],
        parallel: Callable[[], int],
        can_run: Callable[[], bool],
        config: BatchesConfig,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Args:
        content: the content of a batch's file; raises NotFound where it has been deleted.
        principal_of: who has the key of this id; None where it is good no more.
        parallel: how many lines may run at once.
        can_run: whether there is a model to answer lines, and new work is taken.
        tracer: makes a trace of each line.
        """
        self._batches = batches
        self._lines = lines
        self._content = content
        self._principal_of = principal_of
        self._parallel = parallel
        self._can_run = can_run
        self._config = config
        self._tracer = tracer
        self._owner = uuid4().hex
        self._running: dict[asyncio.Task[None], ClaimedLine] = {}
        self._paused_until: dict[str, float] = {}
        """Batch -> when a line of it may be tried again, by the loop's clock."""
        self._principals: dict[str, tuple[Principal | None, float]] = {}
        self._woken = asyncio.Event()
        self.counts = BatchCounts(batches={}, lines={})
        """All batches and lines of the store, empty before they were counted."""
        self._count_due = 0.0

    def wake(self) -> None:
        """Look for work at once: something has been created, cancelled or has ended."""
        self._woken.set()

    async def run(self, routes: LineRoutes) -> None:
        """Run batches until this is cancelled; lines that are being answered then go back to the store."""
        try:
            await self._run(routes)
        finally:
            # Those whose tasks were cancelled before they began, too.
            with suppress(StoreUnavailable):
                await self._lines.give_back_all(self._owner)

    async def _run(self, routes: LineRoutes) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._config.lease_seconds / 3, self._renew))
            while True:
                self._woken.clear()
                wait = POLL_SECONDS
                try:
                    if self._can_run():
                        await self._validate_next()
                        await self._start_lines(routes, group)
                    await self._count()
                except Exception as error:  # noqa: BLE001  # the next turn may do better
                    _report(error)
                    wait = RETRY_SECONDS
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._woken.wait()

    async def _repeat(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception as error:  # noqa: BLE001  # the next time may do better
                _report(error)

    async def _renew(self) -> None:
        await self._lines.renew(self._owner, list(self._running.values()), self._lease)

    async def _count(self) -> None:
        if (now := asyncio.get_running_loop().time()) >= self._count_due:
            self._count_due = now + COUNT_SECONDS
            self.counts = await self._batches.counts()

    @property
    def _lease(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self._config.lease_seconds)

    # --- Validating ---

    async def _validate_next(self) -> None:
        """Store the lines of the file of the batch that has waited longest, or why it cannot be answered."""
        batch = await self._batches.claim_validating(self._owner, self._lease)
        if batch is None:
            return
        total = 0
        try:
            async for lines in BatchInput(batch.endpoint, max_lines=self._config.max_lines).lines(self._content(batch)):
                await self._lines.add(batch.id, lines)
                total += len(lines)
        except InvalidBatch as error:
            await self._batches.fail(batch.id, error.errors)
        except NotFound:
            await self._batches.fail(batch.id, [_NO_FILE])
        else:
            await self._batches.begin(batch.id, total)
        self.wake()  # another may wait

    # --- Choosing lines ---

    async def _start_lines(self, routes: LineRoutes, group: asyncio.TaskGroup) -> None:
        """End the batches that are over, and start as many lines of the others as may run."""
        now = asyncio.get_running_loop().time()
        batches = [batch for batch in await self._batches.active() if await self._has_lines(routes, batch)]
        self._paused_until = {name: until for name, until in self._paused_until.items() if until > now}
        waiting = [batch for batch in batches if batch.id not in self._paused_until]
        while waiting and (free := self._parallel() - len(self._running)) > 0:
            batch = self._next(waiting)
            count = free if len({each.tenant for each in waiting}) == 1 else 1
            lines = await _finished(self._lines.claim(batch.id, self._owner, count, self._lease))
            if not lines:
                waiting.remove(batch)
            for line in lines:
                task = group.create_task(self._run_line(routes, batch, line))
                self._running[task] = line
                task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self.wake()

    def _next(self, batches: Sequence[Batch]) -> Batch:
        """Return the oldest batch of the tenant with the fewest lines running here."""
        tenants = {batch.id: batch.tenant for batch in batches}
        running = Counter(tenants.get(line.batch_id) for line in self._running.values())
        return min(batches, key=lambda batch: running[batch.tenant])

    async def _has_lines(self, routes: LineRoutes, batch: Batch) -> bool:
        """Return whether lines of a batch are to be answered; move it on where none are."""
        if batch.status in (BatchStatus.CANCELLING, BatchStatus.FINALIZING):
            if self._cancel_lines(batch):
                return False  # the last of them wakes this
            if batch.status is BatchStatus.CANCELLING:
                await self._end(batch, BatchStatus.CANCELLED)
            else:
                await self._give_up(routes, batch)
                await self._end(batch, BatchStatus.EXPIRED)
        elif batch.completed + batch.failed >= batch.total:
            await self._end(batch, BatchStatus.COMPLETED)
        elif batch.expires <= datetime.now(UTC):
            await self._batches.expire(batch.id)
            self.wake()
        else:
            return True
        return False

    def _cancel_lines(self, batch: Batch) -> bool:
        """Cancel the lines of a batch that run here; return whether there are any yet."""
        own = [task for task, line in self._running.items() if line.batch_id == batch.id]
        for task in own:
            # A second cancel would interrupt how it gives back what it holds.
            if not task.cancelling():
                task.cancel()
        return bool(own)

    async def _end(self, batch: Batch, status: BatchStatus) -> None:
        if await self._batches.end(batch, status, file_lifetime=self._output_lifetime(batch)):
            figures = {"completed": batch.completed, "failed": batch.failed, "total": batch.total}
            lines = {f"llm_service.batch.lines.{name}": number for name, number in figures.items()}
            described = {"llm_service.batch.status": status.value, **lines}
            self._tracer.batch_ended(batch.id, batch.created.timestamp(), described)

    def _output_lifetime(self, batch: Batch) -> timedelta:
        retention = timedelta(days=self._config.retention_days)
        return retention if batch.output_lifetime is None else min(retention, timedelta(seconds=batch.output_lifetime))

    async def _give_up(self, routes: LineRoutes, batch: Batch) -> None:
        while lines := await self._lines.unanswered(batch.id, GIVEN_UP_AT_ONCE):
            results = [(number, routes.expired(custom_id)) for number, custom_id in lines]
            await self._lines.give_up(batch.id, results)

    # --- Answering a line ---

    async def _run_line(self, routes: LineRoutes, batch: Batch, line: ClaimedLine) -> None:
        try:
            outcome = await self._outcome(routes, batch, line)
            if outcome is None:
                await self._persist(lambda: self._batches.revoke(batch.id, _NOT_ALLOWED))
                await self._persist(lambda: self._lines.give_back(line, self._owner, counted=False))
            elif outcome.error is not None and _may_succeed_later(outcome.error, line):
                self._pause(batch, outcome.error)
                counted = _may_be_its_own_fault(outcome.error)
                await self._persist(lambda: self._lines.give_back(line, self._owner, counted=counted))
            else:
                await self._persist(lambda: self._lines.store(line, self._owner, outcome.result))
        except asyncio.CancelledError:
            with suppress(StoreUnavailable):
                await self._lines.give_back(line, self._owner, counted=False)
            raise
        except Exception as error:  # noqa: BLE001  # its lease ends, and it is tried again
            _report(error)

    async def _outcome(self, routes: LineRoutes, batch: Batch, line: ClaimedLine) -> LineOutcome | None:
        """Answer a line; None where its key is good no more."""
        if line.attempts > MAX_ATTEMPTS:
            error = InternalError("The service ended several times while it answered this request.")
            return routes.refused(batch, line, error)
        try:
            principal = await self._principal(batch.key_id)
        except StoreUnavailable as error:
            return routes.refused(batch, line, error)
        if principal is None:
            return None
        with self._tracer.batch_line(batch.id):
            return await routes.answer(batch, line, principal)

    async def _principal(self, key_id: str) -> Principal | None:
        now = asyncio.get_running_loop().time()
        known, since = self._principals.get(key_id, (None, -FRESH_SECONDS))
        if now - since < FRESH_SECONDS:
            return known
        principal = await self._principal_of(key_id)
        self._principals = {name: each for name, each in self._principals.items() if now - each[1] < FRESH_SECONDS}
        self._principals[key_id] = principal, now
        return principal

    def _pause(self, batch: Batch, error: AppError) -> None:
        seconds = min(max(error.retry_after or 0.0, RETRY_SECONDS), MAX_RETRY_SECONDS)
        self._paused_until[batch.id] = asyncio.get_running_loop().time() + seconds

    async def _persist(self, write: Callable[[], Awaitable[object]]) -> None:
        """Write to the store, however long that takes: a response is not computed twice for a short outage."""
        while True:
            try:
                await write()
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return


async def _finished(work: Awaitable[_T]) -> _T:
    """Await work to its end, also where this is cancelled: what it claims is known to be claimed."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _may_succeed_later(error: AppError, line: ClaimedLine) -> bool:
    """Return whether a line that ended with this error is to be tried again."""
    if _may_be_its_own_fault(error):
        return line.attempts < MAX_ATTEMPTS
    if isinstance(error, QuotaExceeded):
        # Tokens that running requests have reserved are mostly given back.
        details = error.details
        return bool(details["used"] + details.get("requested", 1) <= details["limit"])
    return isinstance(error, RateLimited | ServiceUnavailable)


def _may_be_its_own_fault(error: AppError) -> bool:
    return isinstance(error, EngineFailed | DeadlineExceeded)


def _report(error: Exception) -> None:
    if not isinstance(error, StoreUnavailable):  # which the database's own log lines report
        _log.error("Running batches failed", error=type(error).__name__)
