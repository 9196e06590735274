"""Files and batches in both databases: who sees them, who may run a line, and what is left when they end."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Self

import pytest
from sqlalchemy import func, select

from app.access import batches as batches_module
from app.access import files as files_module
from app.access import tables
from app.access.batch_lines import BatchLines
from app.access.batches import BatchStore
from app.access.database import Database
from app.access.files import FileStore
from app.batches import (
    Batch,
    BatchError,
    BatchStatus,
    BatchUsage,
    InputLine,
    LineResult,
    NewBatch,
    NewFile,
    Page,
    StoredFile,
)
from app.errors import BatchNotFound, Conflict, FileNotFound, InvalidRequest, StorageExceeded
from app.types import Tenant

ANNA, BERT = Tenant.owner("anna"), Tenant.owner("bert")
DAY = timedelta(days=1)
LATER = datetime.now(UTC) + DAY
PAST = datetime.now(UTC) - DAY
ME, OTHER = "me", "other"


async def portions(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def upload(database: Database, *parts: bytes, tenant: Tenant = ANNA, expires: datetime = LATER) -> StoredFile:
    described = NewFile(filename="in.jsonl", purpose="batch", expires=expires)
    return await store_of(database).write(tenant, portions(*parts), lambda created: described)


def store_of(database: Database, *, most: int = 10**7) -> FileStore:
    return FileStore(database, max_file_bytes=10**6, max_stored_bytes=most)


async def begun(database: Database, count: int = 0, *, tenant: Tenant = ANNA) -> Batch:
    """Return a batch whose lines may be answered."""
    batches = BatchStore(database)
    batch = await create(database, tenant=tenant)
    lines = [InputLine(number, f"line{number}", b"{}") for number in range(1, count + 1)]
    if lines:
        await BatchLines(database).add(batch.id, lines)
    assert await batches.begin(batch.id, count)
    return await batches.read(tenant, batch.id)


async def create(database: Database, *, tenant: Tenant = ANNA) -> Batch:
    new = NewBatch(
        tenant=tenant,
        key_id="key",
        endpoint="/v1/completions",
        input_file_id="file-1",
        completion_window="24h",
        metadata={"a": "ä"},
        window=DAY,
    )
    return await BatchStore(database).create(new)


async def rows(database: Database, table: object) -> int:
    async with database.read() as connection:
        return int(await connection.scalar(select(func.count()).select_from(table)) or 0)  # type: ignore[arg-type]


async def content(database: Database, file_id: str, tenant: Tenant = ANNA) -> bytes:
    return b"".join([part async for part in store_of(database).content(tenant, file_id)])


async def test_a_file_is_what_was_uploaded_in_whatever_portions_it_came(
    database: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files_module, "CHUNK_BYTES", 10)
    file = await upload(database, b"0123", b"", b"456789", b"0" * 25)
    assert (35, b"0123456789" + b"0" * 25) == (file.size, await content(database, file.id))
    assert file == await store_of(database).read(ANNA, file.id)
    assert 4 == await rows(database, tables.file_chunks)
    await store_of(database).delete(ANNA, file.id)
    assert (0, 0) == (await rows(database, tables.file_chunks), await rows(database, tables.files))


async def test_a_file_that_does_not_arrive_whole_leaves_nothing(database: Database):
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 300_000
        raise InvalidRequest("no form")

    with pytest.raises(InvalidRequest):
        await store_of(database).write(ANNA, broken(), lambda created: NewFile(filename="", purpose="", expires=LATER))
    assert (0, 0) == (await rows(database, tables.file_chunks), await rows(database, tables.files))


async def test_another_tenants_files_and_batches_are_not_there(database: Database):
    file, batch = await upload(database, b"x"), await begun(database)
    files, batches = store_of(database), BatchStore(database)
    for attempt in (files.read(BERT, file.id), files.delete(BERT, file.id), content(database, file.id, BERT)):
        with pytest.raises(FileNotFound):
            await attempt
    for other in (batches.read(BERT, batch.id), batches.cancel(BERT, batch.id)):
        with pytest.raises(BatchNotFound):
            await other
    assert ([], False) == await files.list(BERT, Page(10))
    assert ([], False) == await batches.list(BERT, Page(10))
    with pytest.raises(FileNotFound):
        await files.list(BERT, Page(10, file.id))


async def test_lists_are_read_page_by_page_in_both_orders(database: Database):
    files = [await upload(database, b"x") for _ in range(5)]
    ids = [file.id for file in sorted(files, key=lambda file: (file.created, file.id))]
    for ascending, expected in ((True, ids), (False, ids[::-1])):
        found, after, more = list[str](), None, True
        while more:
            page, more = await store_of(database).list(ANNA, Page(2, after, ascending), purpose="batch")
            after = page[-1].id
            found += [file.id for file in page]
        assert expected == found
    assert ([], False) == await store_of(database).list(ANNA, Page(2), purpose="other")


async def test_a_tenants_uploads_have_a_limit_in_sum(database: Database):
    store = store_of(database, most=10)
    described = NewFile(filename="a", purpose="batch", expires=LATER)
    await store.write(ANNA, portions(b"12345678"), lambda created: described)
    with pytest.raises(StorageExceeded):
        await store.write(ANNA, portions(b"123"), lambda created: described)
    await store.write(BERT, portions(b"123"), lambda created: described)
    await store.write(ANNA, portions(b"12"), lambda created: described)
    with pytest.raises(StorageExceeded):
        await store.write(ANNA, portions(b""), lambda created: described)


async def test_what_has_expired_is_not_there_and_is_deleted(database: Database):
    file = await upload(database, b"x", expires=PAST)
    with pytest.raises(FileNotFound):
        await store_of(database).read(ANNA, file.id)
    await store_of(database).delete_expired()
    assert (0, 0) == (await rows(database, tables.file_chunks), await rows(database, tables.files))


async def test_of_several_processes_each_line_is_claimed_by_one(database: Database):
    batch = await begun(database, 60)

    async def worker(name: str) -> list[int]:
        lines, found = BatchLines(database), list[int]()
        while claimed := await lines.claim(batch.id, name, 3, LATER):
            for line in claimed:
                assert await lines.store(line, name, LineResult(content=b"x\n"))
                found.append(line.number)
        return found

    claimed = await asyncio.gather(*(worker(f"process{number}") for number in range(6)))
    assert {1} == set(Counter(number for numbers in claimed for number in numbers).values())
    counts = await BatchStore(database).read(ANNA, batch.id)
    assert (60, 60, 0) == (counts.total, counts.completed, counts.failed)


async def test_a_line_of_a_dead_process_is_claimed_again_and_has_one_result(database: Database):
    """The process that was only slow finds its line taken."""
    batch, lines = await begun(database, 1), BatchLines(database)
    (first,) = await lines.claim(batch.id, ME, 9, PAST)
    await lines.renew(ME, [first], LATER)
    assert [] == await lines.claim(batch.id, OTHER, 9, LATER)
    await lines.renew(ME, [first], PAST)
    (second,) = await lines.claim(batch.id, OTHER, 9, LATER)
    assert (1, 2) == (first.attempts, second.attempts)
    assert not await lines.store(first, ME, LineResult(content=b"late\n"))
    assert await lines.store(second, OTHER, LineResult(content=b"right\n"))
    assert not await lines.store(second, OTHER, LineResult(content=b"twice\n"))
    assert b"right\n" == b"".join([part async for part in store_of(database).results(batch.id)])


async def test_a_line_that_is_given_back_is_claimed_again(database: Database):
    batch, lines = await begun(database, 1), BatchLines(database)
    attempts = []
    for counted in (False, True, False):
        (line,) = await lines.claim(batch.id, ME, 1, LATER)
        attempts.append(line.attempts)
        await lines.give_back(line, ME, counted=counted)
    assert [1, 1, 2] == attempts


async def test_a_batch_has_the_usage_of_its_responses_and_the_model_of_the_first(database: Database):
    """A result that is not stored counts nothing; all tenants' lines are counted by state."""
    batch, batches, lines = await begun(database, 4), BatchStore(database), BatchLines(database)
    await create(database, tenant=BERT)
    usage = BatchUsage(input_tokens=7, cached_tokens=3, output_tokens=5, reasoning_tokens=1)
    claimed = await lines.claim(batch.id, ME, 3, LATER)
    for line, model in zip(claimed[:2], ("m", "n"), strict=True):
        result = LineResult(content=b"x\n", model=model, usage=usage)
        assert [True, False] == [await lines.store(line, owner, result) for owner in (ME, OTHER)]
    found, counts = await batches.read(ANNA, batch.id), await batches.counts()
    doubled = BatchUsage(input_tokens=14, cached_tokens=6, output_tokens=10, reasoning_tokens=2)
    assert ("m", doubled) == (found.model, found.usage)
    assert {"waiting": 1, "running": 1, "completed": 2, "failed": 0} == counts.lines
    assert {"in_progress": 1, "validating": 1} == {name: count for name, count in counts.batches.items() if count}


async def test_the_results_are_files_once_the_batch_has_ended(database: Database):
    """One of what was answered, one of what failed; with a file its results go."""
    batch, batches, lines = await begun(database, 4), BatchStore(database), BatchLines(database)
    for line in await lines.claim(batch.id, ME, 4, LATER):
        assert not await batches.end(batch, BatchStatus.COMPLETED, file_lifetime=DAY)
        failed = line.number == 2
        await lines.store(line, ME, LineResult(content=f"{line.number}ä\n".encode(), failed=failed))
    assert await batches.end(batch, BatchStatus.COMPLETED, file_lifetime=DAY)
    assert not await batches.end(batch, BatchStatus.COMPLETED, file_lifetime=DAY)
    ended = await batches.read(ANNA, batch.id)
    output, error = ended.output_file_id, ended.error_file_id
    assert (BatchStatus.COMPLETED, 3, 1) == (ended.status, ended.completed, ended.failed)
    assert output is not None
    assert error is not None
    assert ("1ä\n3ä\n4ä\n", "2ä\n") == (
        (await content(database, output)).decode(),
        (await content(database, error)).decode(),
    )
    described = await store_of(database).read(ANNA, output)
    assert (12, "batch_output", f"{batch.id}_output.jsonl") == (described.size, described.purpose, described.filename)
    await store_of(database).delete(ANNA, output)
    assert "2ä\n" == b"".join([part async for part in store_of(database).results(batch.id)]).decode()


async def test_a_batch_and_its_files_live_to_the_second(database: Database, monkeypatch: pytest.MonkeyPatch):
    """However many seconds begin while they are stored."""

    class Clock(datetime):
        looks = itertools.count()

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time() + next(cls.looks), tz)

    monkeypatch.setattr(batches_module, "datetime", Clock)
    batch, batches, lines = await begun(database, 2), BatchStore(database), BatchLines(database)
    for line in await lines.claim(batch.id, ME, 2, LATER):
        await lines.store(line, ME, LineResult(content=b"x\n", failed=line.number == 2))
    assert await batches.end(batch, BatchStatus.COMPLETED, file_lifetime=DAY)
    ended = await batches.read(ANNA, batch.id)
    monkeypatch.undo()
    ids = [each for each in (ended.output_file_id, ended.error_file_id) if each is not None]
    files = [await store_of(database).read(ANNA, each) for each in ids]

    assert DAY == ended.expires - ended.created
    assert [DAY] * 2 == [each.expires - each.created for each in files]
    assert [ended.ended] * 2 == [each.created for each in files]


async def test_a_batch_is_cancelled_once_no_line_of_it_runs(database: Database):
    batch, batches, lines = await begun(database, 3), BatchStore(database), BatchLines(database)
    (line,) = await lines.claim(batch.id, ME, 1, LATER)
    cancelling = await batches.cancel(ANNA, batch.id)
    assert (BatchStatus.CANCELLING, True) == (cancelling.status, cancelling.cancelling is not None)
    assert [] == await lines.claim(batch.id, OTHER, 9, LATER)
    assert not await batches.end(cancelling, BatchStatus.CANCELLED, file_lifetime=DAY)
    await lines.store(line, ME, LineResult(content=b"1\n"))
    assert await batches.end(cancelling, BatchStatus.CANCELLED, file_lifetime=DAY)
    cancelled = await batches.cancel(ANNA, batch.id)
    assert (BatchStatus.CANCELLED, 1, 3) == (cancelled.status, cancelled.completed, cancelled.total)
    assert cancelled.output_file_id is not None
    async with database.read() as connection:
        requests = select(func.count(tables.batch_lines.c.request))
        assert 0 == await connection.scalar(requests)


async def test_a_batch_that_has_ended_cannot_be_cancelled(database: Database):
    batch, batches = await create(database), BatchStore(database)
    await batches.fail(batch.id, [BatchError("empty_file", "It is empty.")])
    with pytest.raises(Conflict):
        await batches.cancel(ANNA, batch.id)
    failed = await batches.read(ANNA, batch.id)
    assert ((BatchError("empty_file", "It is empty."),), {"a": "ä"}) == (failed.errors, failed.metadata)


async def test_lines_that_are_given_up_are_counted_once(database: Database):
    batch, batches, lines = await begun(database, 3), BatchStore(database), BatchLines(database)
    (line,) = await lines.claim(batch.id, ME, 1, LATER)
    await batches.expire(batch.id)
    left = await lines.unanswered(batch.id, 10)
    results = [(number, LineResult(content=b"over\n", failed=True)) for number, _ in left]
    await lines.give_up(batch.id, results)
    await lines.give_up(batch.id, results)
    assert not await lines.store(line, ME, LineResult(content=b"late\n"))
    (expired,) = await batches.active()
    assert (BatchStatus.FINALIZING, 3, 0) == (expired.status, expired.failed, expired.completed)
    assert await batches.end(expired, BatchStatus.EXPIRED, file_lifetime=DAY)


async def test_a_file_is_validated_by_one_process_and_by_the_next_if_that_dies(database: Database):
    """Which begins anew: what the first has stored of it is gone."""
    batch, batches, lines = await create(database), BatchStore(database), BatchLines(database)
    claims = await asyncio.gather(*(batches.claim_validating(f"p{n}", LATER) for n in range(4)))
    assert [batch.id] == [each.id for each in claims if each is not None]
    await lines.add(batch.id, [InputLine(1, "a", b"{}")])
    for n in range(4):
        await lines.renew(f"p{n}", [], PAST)
    again = await batches.claim_validating(OTHER, LATER)
    assert again is not None
    assert 0 == await rows(database, tables.batch_lines)
    await lines.renew(OTHER, [], LATER)
    assert await batches.claim_validating(ME, LATER) is None


async def test_batches_that_ended_long_ago_are_deleted_with_all_of_theirs(database: Database):
    old, batches, lines = await begun(database, 1), BatchStore(database), BatchLines(database)
    (line,) = await lines.claim(old.id, ME, 1, LATER)
    await lines.store(line, ME, LineResult(content=b"1\n"))
    await batches.end(old, BatchStatus.COMPLETED, file_lifetime=DAY)
    young = await begun(database, 1)
    await batches.delete_old(datetime.now(UTC))
    assert (1, 1, 0) == tuple(
        [await rows(database, table) for table in (tables.batches, tables.batch_lines, tables.files)]
    )
    assert 1 == await batches.unfinished(ANNA)
    assert young.id == (await batches.read(ANNA, young.id)).id
