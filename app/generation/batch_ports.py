"""The ports of the batch runner: what it needs of the store of batches, and of the routes that answer their lines.

`access/batches.py` and `access/batch_lines.py` are the store, `web/openai/batch_routes.py` are the routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from app.batches import Batch, BatchCounts, BatchError, BatchStatus, ClaimedLine, InputLine, LineResult
from app.errors import AppError
from app.types import Principal


class BatchStore(Protocol):
    """Batches of all tenants, as every process sees them."""

    async def claim_validating(self, owner: str, until: datetime) -> Batch | None:
        """Return a batch whose file this process is to validate; it has no lines then."""

    async def begin(self, batch_id: str, total: int) -> bool:
        """Let the lines of a validated batch be answered."""

    async def fail(self, batch_id: str, errors: Sequence[BatchError]) -> None:
        """End a batch whose file cannot be answered."""

    async def active(self) -> Sequence[Batch]:
        """Return the batches that have lines to answer, or are to be ended, oldest first."""

    async def revoke(self, batch_id: str, error: BatchError) -> None:
        """Begin to cancel a batch whose key is good no more."""

    async def counts(self) -> BatchCounts:
        """Return how many batches and lines there are, of all tenants."""

    async def expire(self, batch_id: str) -> None:
        """Stop answering the lines of a batch whose time is over."""

    async def end(self, batch: Batch, status: BatchStatus, *, file_lifetime: timedelta) -> bool:
        """End a batch once no line of it is being answered, and show its results as files."""


class BatchLines(Protocol):
    """The lines of batches; each is claimed by one process at a time."""

    async def add(self, batch_id: str, lines: Sequence[InputLine]) -> None:
        """Add lines to a batch whose file is being validated."""

    async def claim(self, batch_id: str, owner: str, count: int, until: datetime) -> Sequence[ClaimedLine]:
        """Return the next lines of a batch, which nobody else gets before the lease ends."""

    async def renew(self, owner: str, lines: Sequence[ClaimedLine], until: datetime) -> None:
        """Say that a process still lives that answers these lines, or validates a file."""

    async def store(self, line: ClaimedLine, owner: str, result: LineResult) -> bool:
        """Store the result of a line; return False where another process has it by now."""

    async def give_back(self, line: ClaimedLine, owner: str, *, counted: bool) -> None:
        """Let a line be claimed again, by whichever process."""

    async def give_back_all(self, owner: str) -> None:
        """Do the same with all lines that a process has claimed; their attempts are not counted."""

    async def unanswered(self, batch_id: str, count: int) -> Sequence[tuple[int, str]]:
        """Return numbers and custom ids of lines without a result."""

    async def give_up(self, batch_id: str, results: Sequence[tuple[int, LineResult]]) -> None:
        """Store why lines were not answered, of a batch whose time is over."""


@dataclass(frozen=True, slots=True)
class LineOutcome:
    """What became of one attempt to answer a line."""

    result: LineResult
    error: AppError | None = None
    """What refused or ended it; None: it was answered."""


class LineRoutes(Protocol):
    """Answers lines as live requests are answered."""

    async def answer(self, batch: Batch, line: ClaimedLine, principal: Principal) -> LineOutcome:
        """Answer a line; cancelling this ends the request.  Errors are outcomes, and never raised."""

    def refused(self, batch: Batch, line: ClaimedLine, error: AppError) -> LineOutcome:
        """Return the outcome of a line that was not sent to its route."""

    def expired(self, custom_id: str) -> LineResult:
        """Return the result of a line whose batch is over before it was answered."""
