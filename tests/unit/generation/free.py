"""Accounts that cost nothing and write nothing down but in a list."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.access.admission import Reservation
from app.access.rights import check_rights
from app.generation.metering import Accounts
from app.types import InferenceRecord, Principal


class NoLimit:
    """Admission without any limit."""

    check_rights = staticmethod(check_rights)

    @asynccontextmanager
    async def reserve(self, principal: Principal, tokens: int) -> AsyncIterator[Reservation]:
        yield Reservation(counted=False)


class ListJournal:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[InferenceRecord] = []

    def write(self, record: InferenceRecord) -> None:
        self.records.append(record)


def free_accounts(journal: ListJournal | None = None) -> Accounts:
    """Return accounts without any limit."""
    return Accounts(
        admission=NoLimit(),
        journal=journal or ListJournal(),
        cached_prompt=0,
        cached_completion=0,
        keep_text=True,
    )
