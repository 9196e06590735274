"""A store of batches in memory, and routes that answer lines as a test says: what a batch runner works with."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from app.batches import Batch, BatchCounts, BatchError, BatchStatus, ClaimedLine, InputLine, LineResult
from app.config import BatchesConfig
from app.errors import AppError, StoreUnavailable
from app.generation.batch_ports import LineOutcome
from app.generation.batch_runner import BatchRunner
from app.types import Principal, Tenant

ENDPOINT = "/v1/completions"
NOW = datetime.now(UTC)


@dataclass
class FakeLine:
    """A line as it is stored."""

    custom_id: str
    body: bytes
    state: str = "waiting"
    owner: str | None = None
    lease: datetime = NOW
    attempts: int = 0
    result: bytes = b""

    def is_claimed(self, owner: str, attempts: int) -> bool:
        """Return whether the process still has it by that attempt."""
        return (self.state, self.owner, self.attempts) == ("running", owner, attempts)


@dataclass
class FakeBatches:
    """Batches and their lines, with the promises of the database's stores."""

    batches: dict[str, Batch] = field(default_factory=dict)
    lines: dict[str, dict[int, FakeLine]] = field(default_factory=dict)
    leases: dict[str, datetime] = field(default_factory=dict)
    down: bool = False

    def create(self, name: str, *, tenant: str = "a", key: str = "k", expires: datetime | None = None) -> None:
        batch = Batch(
            id=name,
            tenant=tenant,
            key_id=key,
            endpoint=ENDPOINT,
            input_file_id=name,
            completion_window="24h",
            metadata=None,
            status=BatchStatus.VALIDATING,
            created=NOW + timedelta(seconds=len(self.batches)),
            expires=expires or NOW + timedelta(hours=24),
        )
        self.batches[name], self.lines[name] = batch, {}

    def change(self, name: str, **values: object) -> None:
        self.batches[name] = replace(self.batches[name], **values)  # type: ignore[arg-type]

    def _refuse(self) -> None:
        if self.down:
            raise StoreUnavailable()

    async def claim_validating(self, owner: str, until: datetime) -> Batch | None:
        self._refuse()
        for batch in self.batches.values():
            free = self.leases.get(batch.id, NOW) < datetime.now(UTC)
            if batch.status is BatchStatus.VALIDATING and free:
                self.leases[batch.id] = until
                self.lines[batch.id] = {}
                return batch
        return None

    async def begin(self, batch_id: str, total: int) -> bool:
        self.change(batch_id, status=BatchStatus.IN_PROGRESS, total=total)
        return True

    async def fail(self, batch_id: str, errors: Sequence[BatchError]) -> None:
        self.change(batch_id, status=BatchStatus.FAILED, errors=tuple(errors))

    async def active(self) -> Sequence[Batch]:
        self._refuse()
        active = (BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
        return [batch for batch in self.batches.values() if batch.status in active]

    async def counts(self) -> BatchCounts:
        lines = Counter(line.state for lines in self.lines.values() for line in lines.values())
        return BatchCounts(batches=Counter(batch.status for batch in self.batches.values()), lines=lines)

    async def revoke(self, batch_id: str, error: BatchError) -> None:
        self.change(batch_id, status=BatchStatus.CANCELLING, errors=(error,))

    async def expire(self, batch_id: str) -> None:
        self.change(batch_id, status=BatchStatus.FINALIZING)

    async def end(self, batch: Batch, status: BatchStatus, *, file_lifetime: timedelta) -> bool:
        if any(line.state == "running" for line in self.lines[batch.id].values()):
            return False
        self.change(batch.id, status=status)
        return True

    async def add(self, batch_id: str, lines: Sequence[InputLine]) -> None:
        self._refuse()
        self.lines[batch_id] |= {line.number: FakeLine(line.custom_id, line.body) for line in lines}

    async def claim(self, batch_id: str, owner: str, count: int, until: datetime) -> Sequence[ClaimedLine]:
        self._refuse()
        if self.batches[batch_id].status is not BatchStatus.IN_PROGRESS:
            return []
        claimed: list[ClaimedLine] = []
        for number, line in self.lines[batch_id].items():
            lapsed = line.state == "running" and line.lease < datetime.now(UTC)
            if (line.state == "waiting" or lapsed) and len(claimed) < count:
                line.state, line.owner, line.lease, line.attempts = "running", owner, until, line.attempts + 1
                claimed.append(ClaimedLine(batch_id, number, line.custom_id, line.body, line.attempts))
        return claimed

    async def renew(self, owner: str, lines: Sequence[ClaimedLine], until: datetime) -> None:
        for each in lines:
            self.lines[each.batch_id][each.number].lease = until

    async def store(self, line: ClaimedLine, owner: str, result: LineResult) -> bool:
        self._refuse()
        found = self.lines[line.batch_id][line.number]
        if not found.is_claimed(owner, line.attempts):
            return False
        found.state, found.result = "failed" if result.failed else "completed", result.content
        batch = self.batches[line.batch_id]
        done = {"failed": batch.failed + 1} if result.failed else {"completed": batch.completed + 1}
        self.change(line.batch_id, **done)
        return True

    async def give_back(self, line: ClaimedLine, owner: str, *, counted: bool) -> None:
        self._refuse()
        found = self.lines[line.batch_id][line.number]
        if found.is_claimed(owner, line.attempts):
            found.state, found.owner, found.attempts = "waiting", None, found.attempts - (not counted)

    async def give_back_all(self, owner: str) -> None:
        self._refuse()
        for line in (line for lines in self.lines.values() for line in lines.values()):
            if line.state == "running" and line.owner == owner:
                line.state, line.owner, line.attempts = "waiting", None, line.attempts - 1

    async def unanswered(self, batch_id: str, count: int) -> Sequence[tuple[int, str]]:
        lines = self.lines[batch_id].items()
        return [(number, line.custom_id) for number, line in lines if line.state in ("waiting", "running")][:count]

    async def give_up(self, batch_id: str, results: Sequence[tuple[int, LineResult]]) -> None:
        for number, result in results:
            self.lines[batch_id][number].state, self.lines[batch_id][number].result = "failed", result.content

    def states(self, name: str) -> list[str]:
        return [line.state for line in self.lines[name].values()]


@dataclass
class FakeRoutes:
    """Answers every line, unless there are errors for it."""

    errors: dict[str, list[AppError]] = field(default_factory=dict)
    """Custom id -> what its next attempts end with."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Lines wait for it."""
    answered: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    most_running: int = 0
    cancelled: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    """Of those, the ones that had the time to give back what they held."""
    principals: list[Principal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def answer(self, batch: Batch, line: ClaimedLine, principal: Principal) -> LineOutcome:
        self.running.append(line.custom_id)
        self.most_running = max(self.most_running, len(self.running))
        self.principals.append(principal)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(line.custom_id)
            await asyncio.sleep(0.05)
            self.freed.append(line.custom_id)
            raise
        finally:
            self.running.remove(line.custom_id)
        if errors := self.errors.get(line.custom_id):
            return self.refused(batch, line, errors.pop(0))
        self.answered.append(line.custom_id)
        return LineOutcome(LineResult(content=line.custom_id.encode()))

    def refused(self, batch: Batch, line: ClaimedLine, error: AppError) -> LineOutcome:
        return LineOutcome(LineResult(content=error.code.encode(), failed=True), error)

    def expired(self, custom_id: str) -> LineResult:
        return LineResult(content=b"expired", failed=True)


@dataclass
class Runner:
    """A runner over a fake store, and what it reads."""

    store: FakeBatches = field(default_factory=FakeBatches)
    routes: FakeRoutes = field(default_factory=FakeRoutes)
    files: dict[str, bytes] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    ready: bool = True
    parallel: int = 4
    config: BatchesConfig = field(default_factory=lambda: BatchesConfig(lease_seconds=1))

    def __post_init__(self) -> None:
        self.runner = BatchRunner(
            self.store,
            self.store,
            content=self._content,
            principal_of=self._principal,
            parallel=lambda: self.parallel,
            can_run=lambda: self.ready,
            config=self.config,
        )

    async def _content(self, batch: Batch) -> AsyncIterator[bytes]:
        yield self.files[batch.id]

    async def _principal(self, key_id: str) -> Principal | None:
        return None if key_id in self.revoked else Principal(key_id, Tenant.key(key_id))

    def create(self, name: str, count: int, **values: object) -> None:
        """Create a batch of so many lines."""
        self.store.create(name, **values)  # type: ignore[arg-type]
        line = '{"custom_id": "%s%d", "method": "POST", "url": "%s", "body": {}}'
        self.files[name] = "\n".join(line % (name, number, ENDPOINT) for number in range(count)).encode()
        self.runner.wake()

    async def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Run until something has happened."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.005)

    def is_over(self, name: str) -> bool:
        return self.store.batches[name].status.is_final
