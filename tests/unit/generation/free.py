"""Accounts that cost nothing and write nothing down but in a list."""

from app.generation.metering import Accounts
from app.types import InferenceRecord, Principal


class NoLimit:
    """A budget that nobody has."""

    async def reserve(self, caller: Principal, tokens: int) -> None:
        return None


class ListJournal:
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[InferenceRecord] = []

    def write(self, record: InferenceRecord) -> None:
        self.records.append(record)


def free_accounts(journal: ListJournal | None = None) -> Accounts:
    """Return accounts without any limit."""
    return Accounts(
        rate=NoLimit(),
        quota=NoLimit(),
        journal=journal or ListJournal(),
        cached_prompt=0,
        cached_completion=0,
        keep_text=True,
    )
