"""An admission that allows everything, and an inference log that is a list: parts of a service that costs nothing."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from app.errors import AppError
from app.generation.metering import UsageRecorder
from app.types import InferenceRecord, Principal


@dataclass
class FakeReservation:
    """Tokens that were set aside for one request."""

    tokens: int
    counted: bool = False
    committed: int | None = None
    """What was really used; None until it is known."""
    released: bool = False
    """Whether the request is over."""

    lowered: int | None = None
    """What it was lowered to; None where it was not."""

    async def lower(self, tokens: int) -> None:
        self.lowered = tokens

    def commit(self, tokens: int) -> None:
        assert not self.released, "a reservation that has been released can commit nothing"
        self.committed = tokens


@dataclass
class FakeAdmission:
    """Allows every request unless it is given a reason not to, and records what each reserved and used."""

    forbidden: AppError | None = None
    """Raised for every request as soon as its rights are checked."""
    exhausted: AppError | None = None
    """Raised for every request that would reserve tokens."""
    checks: list[dict[str, object]] = field(default_factory=list)
    """What each request needed rights for."""
    reservations: list[FakeReservation] = field(default_factory=list)
    least_tokens: list[int] = field(default_factory=list)
    """The lower bound that each request was checked for before its prompt was prepared."""

    def check_rights(self, principal: Principal, **uses: object) -> None:
        self.checks.append({"principal": principal, **uses})
        if self.forbidden is not None:
            raise self.forbidden

    async def check_tokens(self, principal: Principal, tokens: int) -> None:
        self.least_tokens.append(tokens)

    @asynccontextmanager
    async def reserve(
        self, principal: Principal, tokens: int, count: Callable[[], Awaitable[int]] | None = None
    ) -> AsyncIterator[FakeReservation]:
        if self.exhausted is not None:
            raise self.exhausted
        reservation = FakeReservation(tokens)
        self.reservations.append(reservation)
        try:
            yield reservation
        finally:
            reservation.released = True

    @property
    def open(self) -> int:
        """Return how many reservations have not been released."""
        return sum(not each.released for each in self.reservations)


class ListLog:
    """Holds the records in the order in which they were written."""

    def __init__(self) -> None:
        self.records: list[InferenceRecord] = []

    def write(self, record: InferenceRecord) -> None:
        self.records.append(record)


def usage_recorder(
    log: ListLog | None = None, *, cached_prompt: float = 0, cached_completion: float = 0, store_text: bool = True
) -> UsageRecorder:
    """Return a recorder under which a replayed response costs nothing unless the test wants otherwise."""
    return UsageRecorder(
        log=log or ListLog(),
        cached_prompt=cached_prompt,
        cached_completion=cached_completion,
        store_text=store_text,
    )
