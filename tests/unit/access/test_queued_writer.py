"""The queue in front of the database: order, batches, outages, and the end."""

import asyncio
from collections.abc import Sequence

from app.access import queued_writer as module
from app.access.background import BackgroundGroup
from app.access.queued_writer import QueuedWriter
from tests.waiting import until


class Table:
    """What has been written, by a database that can be away, slow or broken."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.lost: list[int] = []
        self.away = False
        self.broken = False
        self.answers = asyncio.Event()
        self.answers.set()

    @property
    def rows(self) -> list[int]:
        return [item for batch in self.batches for item in batch]

    async def write(self, batch: Sequence[int]) -> Sequence[int]:
        await self.answers.wait()
        if self.broken:
            raise ValueError("canary")
        if self.away:
            return batch
        self.batches.append(list(batch))
        return ()

    def drop(self, items: Sequence[int]) -> None:
        self.lost += items

    def writer(self, *, max_batch: int = 3, max_waiting: int = 100, flush_seconds: float = 0) -> QueuedWriter[int]:
        return QueuedWriter(
            self.write, on_drop=self.drop, max_batch=max_batch, max_waiting=max_waiting, flush_seconds=flush_seconds
        )


async def test_what_arrives_meanwhile_goes_into_the_next_batch(background: BackgroundGroup):
    table = Table()
    table.answers.clear()
    writer = table.writer()
    writer.start(background)
    writer.put(0)
    await until(lambda: not writer.waiting)
    for number in range(1, 6):
        writer.put(number)
    table.answers.set()
    await until(lambda: not writer.waiting)
    await writer.close()

    assert [[0], [1, 2, 3], [4, 5]] == table.batches


async def test_an_outage_keeps_the_order_and_loses_nothing(background: BackgroundGroup, monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    table = Table()
    table.away = True
    writer = table.writer()
    writer.start(background)
    for number in range(7):
        writer.put(number)
    await asyncio.sleep(0.05)
    assert 7 == writer.waiting
    table.away = False
    await until(lambda: not writer.waiting)

    assert list(range(7)) == table.rows
    assert [] == table.lost


async def test_the_oldest_goes_where_the_queue_is_full():
    table = Table()
    writer = table.writer(max_waiting=3)
    for number in range(5):
        writer.put(number)

    assert [0, 1] == table.lost
    assert 3 == writer.waiting


async def test_a_batch_that_cannot_be_written_does_not_stop_those_behind_it(background: BackgroundGroup):
    table = Table()
    table.broken = True
    writer = table.writer()
    writer.start(background)
    writer.put(1)
    await until(lambda: bool(table.lost))
    table.broken = False
    writer.put(2)
    await until(lambda: bool(table.batches))

    assert ([1], [[2]]) == (table.lost, table.batches)


async def test_closing_writes_what_waits_and_counts_what_cannot_be_written(background: BackgroundGroup, monkeypatch):
    """A flush interval longer than the service's life costs no row; a database that is away costs a bounded time."""
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    tables = Table(), Table()
    tables[1].answers.clear()
    for table in tables:
        writer = table.writer(flush_seconds=3600)
        writer.start(background)
        for number in range(5):
            writer.put(number)
        await writer.close()

    assert ([0, 1, 2, 3, 4], []) == (tables[0].rows, tables[0].lost)
    assert ([], [0, 1, 2, 3, 4]) == (tables[1].rows, tables[1].lost)
