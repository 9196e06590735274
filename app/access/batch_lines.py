"""The lines of batches: claimed with a lease by one process at a time, answered once, counted in the same transaction.

A process that dies renews its lease no more, and its lines are claimed by another, or by itself after a restart.  A
result is stored only by the process that holds the claim, so no line has two.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, func, insert, or_, select, update

from app.access import tables
from app.access.database import Database
from app.batches import BatchStatus, ClaimedLine, InputLine, LineResult

_batches, _lines = tables.batches, tables.batch_lines


class BatchLines:
    """The lines of all batches."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def add(self, batch_id: str, lines: Sequence[InputLine]) -> None:
        """Add lines to a batch whose file is being validated."""
        rows = [
            {"batch_id": batch_id, "number": line.number, "custom_id": line.custom_id, "request": line.body}
            | {"state": "waiting", "attempts": 0}
            for line in lines
        ]
        async with self._db.begin() as connection:
            await connection.execute(insert(_lines), rows)

    async def claim(self, batch_id: str, owner: str, count: int, until: datetime) -> Sequence[ClaimedLine]:
        """Return the next lines of a batch, which nobody else gets before the lease ends."""
        work = partial(_claim, batch_id=batch_id, owner=owner, count=count, until=until)
        return await self._db.run_in_transaction(work)

    async def renew(self, owner: str, lines: Sequence[ClaimedLine], until: datetime) -> None:
        """Say that a process still lives that answers these lines, or validates a file."""
        await self._db.run_in_transaction(partial(_renew, owner=owner, lines=lines, until=until))

    async def store(self, line: ClaimedLine, owner: str, result: LineResult) -> bool:
        """Store the result of a line; return False where another process has it by now."""
        return await self._db.run_in_transaction(partial(_store, line=line, owner=owner, result=result), durable=True)

    async def give_back(self, line: ClaimedLine, owner: str, *, counted: bool) -> None:
        """Let a line be claimed again, by whichever process.

        Args: counted: whether the attempt was one of the few that a line has.
        """
        await self._db.run_in_transaction(partial(_give_back, line=line, owner=owner, counted=counted))

    async def give_back_all(self, owner: str) -> None:
        """Do the same with all lines that a process has claimed; their attempts are not counted."""
        await self._db.run_in_transaction(partial(_give_back_all, owner=owner))

    async def unanswered(self, batch_id: str, count: int) -> Sequence[tuple[int, str]]:
        """Return numbers and custom ids of lines without a result."""
        query = select(_lines.c.number, _lines.c.custom_id).order_by(_lines.c.number).limit(count)
        left = _lines.c.state.in_(("waiting", "running"))
        async with self._db.read() as connection:
            rows = (await connection.execute(query.where(_lines.c.batch_id == batch_id, left))).all()
        return [(row.number, row.custom_id) for row in rows]

    async def give_up(self, batch_id: str, results: Sequence[tuple[int, LineResult]]) -> None:
        """Store why lines were not answered, of a batch whose time is over."""
        async with self._db.begin() as connection:
            count = 0
            for number, result in results:
                which = (_lines.c.batch_id == batch_id) & (_lines.c.number == number)
                change = update(_lines).where(which, _lines.c.state.in_(("waiting", "running")))
                count += (await connection.execute(change.values(_ended(result)))).rowcount
            failed = _batches.c.failed + count
            await connection.execute(update(_batches).where(_batches.c.id == batch_id).values(failed=failed))


def _claim(connection: Connection, *, batch_id: str, owner: str, count: int, until: datetime) -> Sequence[ClaimedLine]:
    now = datetime.now(UTC)
    lapsed = and_(_lines.c.state == "running", _lines.c.lease < now)
    running = select(_batches.c.id).where(_batches.c.id == batch_id, _batches.c.status == BatchStatus.IN_PROGRESS)
    if connection.scalar(running) is None:
        return []
    free = select(_lines.c.number).where(_lines.c.batch_id == batch_id, or_(_lines.c.state == "waiting", lapsed))
    first = free.order_by(_lines.c.number).limit(count).with_for_update(skip_locked=True)
    numbers = connection.execute(first).scalars().all()
    if not numbers:
        return []
    values: dict[str, Any] = {"state": "running", "owner": owner, "lease": until, "attempts": _lines.c.attempts + 1}
    which = (_lines.c.batch_id == batch_id) & _lines.c.number.in_(numbers)
    claimed = (_lines.c.batch_id, _lines.c.number, _lines.c.custom_id, _lines.c.request, _lines.c.attempts)
    rows = connection.execute(update(_lines).where(which).values(**values).returning(*claimed)).all()
    return sorted((ClaimedLine(*row) for row in rows), key=lambda line: line.number)


def _renew(connection: Connection, *, owner: str, lines: Sequence[ClaimedLine], until: datetime) -> None:
    for line in sorted(lines, key=lambda each: (each.batch_id, each.number)):
        connection.execute(update(_lines).where(_claimed(line, owner)).values(lease=until))
    validated = (_batches.c.owner == owner) & (_batches.c.status == BatchStatus.VALIDATING)
    connection.execute(update(_batches).where(validated).values(lease=until))


def _store(connection: Connection, *, line: ClaimedLine, owner: str, result: LineResult) -> bool:
    if connection.execute(update(_lines).where(_claimed(line, owner)).values(_ended(result))).rowcount == 0:
        return False
    counter = _batches.c.failed if result.failed else _batches.c.completed
    values = {counter: counter + 1, _batches.c.model: func.coalesce(_batches.c.model, result.model)}
    values |= {_batches.c[name]: _batches.c[name] + count for name, count in asdict(result.usage).items()}
    connection.execute(update(_batches).where(_batches.c.id == line.batch_id).values(values))
    return True


def _give_back(connection: Connection, *, line: ClaimedLine, owner: str, counted: bool) -> None:
    values: dict[str, Any] = {"state": "waiting", "owner": None, "lease": None}
    if not counted:
        values["attempts"] = _lines.c.attempts - 1
    connection.execute(update(_lines).where(_claimed(line, owner)).values(**values))


def _give_back_all(connection: Connection, *, owner: str) -> None:
    values: dict[str, Any] = {"state": "waiting", "owner": None, "lease": None, "attempts": _lines.c.attempts - 1}
    connection.execute(update(_lines).where(_lines.c.owner == owner, _lines.c.state == "running").values(**values))


def _claimed(line: ClaimedLine, owner: str) -> Any:
    this = (_lines.c.batch_id == line.batch_id) & (_lines.c.number == line.number)
    return this & (_lines.c.state == "running") & (_lines.c.owner == owner) & (_lines.c.attempts == line.attempts)


def _ended(result: LineResult) -> dict[str, Any]:
    state = "failed" if result.failed else "completed"
    return {"state": state, "result": result.content, "request": None, "owner": None, "lease": None}
