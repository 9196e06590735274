"""Several replicas on one database, and a database that goes away."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from app.access import authenticator
from app.access.background import BackgroundGroup
from app.access.database import WAIT_SECONDS, Database
from app.access.ledger import Month, balance
from app.access.quotas import Quotas
from app.access.tables import completion_cache, inference_log
from app.config import QuotaConfig
from app.errors import StoreUnavailable
from app.types import Limits, Principal, Tenant
from tests.services.postgres import Postgres
from tests.waiting import HANG_SECONDS
from tests.web.access import ADMIN_KEY, Running, running

CALLER = Principal("key", Tenant.owner("tenant"), limits=Limits(monthly_tokens=1000))


async def test_two_replicas_share_keys_and_quotas(url: str, tmp_path: Path):
    """A key that one revokes the other refuses within seconds; no token of a quota is granted by both."""
    given: dict[str, Any] = {"database": {"url": url}}
    async with running(tmp_path / "a", **given) as one, running(tmp_path / "b", **given) as other:
        key = await one.key(limits={"monthly_tokens": 200})
        replies = await asyncio.gather(*(replica.generate(key) for replica in (one, other) for _ in range(20)))
        report = await other.usage(key)
        async with one.client() as admin:
            await admin.delete(f"/v1/keys/{key.split('_')[1]}")
        async with asyncio.timeout(HANG_SECONDS):
            while (await other.generate(key)).status_code != 401:  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.1)
        here = await one.generate(key)

    assert 20 == sum(reply.status_code == 200 for reply in replies)
    assert {200, 429} == {reply.status_code for reply in replies}
    assert (200, 0) == (report["used"], report["reserved"])
    assert 401 == here.status_code


async def test_an_answer_outlives_its_process_and_is_shared(url: str, tmp_path: Path):
    """The second service has it from the database; for another tenant, or once it is too old, it is made anew."""
    given: dict[str, Any] = {"database": {"url": url}, "cache": {"persistent": True, "ttl_seconds": 60}}
    body = {"prompt": "hello world", "max_tokens": 50, "cache": True}
    async with running(tmp_path / "a", **given) as one:
        first = await one.generate(ADMIN_KEY, **body)
    async with running(tmp_path / "b", **given) as other:
        second = await other.generate(ADMIN_KEY, **body)
        streamed = await other.generate(ADMIN_KEY, **body | {"stream": True})
        foreign = await other.generate(await other.key(), **body)
        await other.access.response_cache.close()  # what is being written is there then
        async with other.access.database.begin() as connection:
            await connection.execute(update(completion_cache).values(expires=datetime(2026, 1, 1, tzinfo=UTC)))
        await other.access.response_cache.delete_expired()
        async with other.access.database.begin() as connection:
            left = await connection.scalar(select(func.count()).select_from(completion_cache))

    assert [False, True, False] == [reply.json()["cached"] for reply in (first, second, foreign)]
    assert first.json()["generated_text"] == second.json()["generated_text"]
    assert '"cached":true' in streamed.text
    assert 0 == left


async def test_what_a_dead_process_had_reserved_is_released_by_its_lease(url: str, database: Database):
    """A living one renews its own; a commit that comes too late still counts."""
    config = QuotaConfig(lease_seconds=1.5)
    other = Database(url)
    dead, alive = Quotas(other, config), Quotas(database, config)
    groups = BackgroundGroup(), BackgroundGroup()
    for quotas, group in zip((dead, alive), groups, strict=True):
        await group.start()
        quotas.start(group)
    lost = await dead.reserve(CALLER, 300)
    held = await alive.reserve(CALLER, 500)
    assert lost is not None
    assert held is not None
    await groups[0].close()
    counter = Month("key", held.counter.month)

    async with asyncio.timeout(HANG_SECONDS):
        while (await balance(database, counter)).reserved != 500:  # noqa: ASYNC110  # another task's work
            await asyncio.sleep(0.05)
    await asyncio.sleep(1.5 * config.lease_seconds)
    freed = await balance(database, counter)
    await alive.commit(held, 20)
    await alive.commit(lost, 30)
    committed = await balance(database, counter)
    await alive.close()
    await groups[1].close()
    await other.close()

    assert (0, 500) == (freed.used, freed.reserved)
    assert (50, 0) == (committed.used, committed.reserved)


@pytest.mark.services
async def test_quotas_survive_a_restart_of_postgres(postgres: Postgres, postgres_url: str, tmp_path: Path):
    """While it is down: 503 for a key with a quota, an answer for one without.  Then all is counted exactly once."""
    async with running(tmp_path, patience=WAIT_SECONDS, database={"url": postgres_url}) as service:
        key = await service.key(limits={"monthly_tokens": 100_000})
        statuses = [(await service.generate(key)).status_code for _ in range(5)]
        open_request = asyncio.create_task(service.generate(key, prompt="word " * 100, max_tokens=500))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(postgres.stop)
        down = await service.generate(key)
        unlimited = await service.generate(ADMIN_KEY)
        await asyncio.to_thread(postgres.start)
        async with asyncio.timeout(HANG_SECONDS):
            while (await service.generate(key)).status_code != 200:  # noqa: ASYNC110  # Postgres' start has no event
                await asyncio.sleep(0.1)
        first = await open_request
        async with asyncio.timeout(HANG_SECONDS):
            while (report := await service.usage(key))["reserved"]:  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.05)

    assert [200] * 5 == statuses
    assert (503, 200) == (down.status_code, unlimited.status_code)
    assert 6 * 10 + (1000 if first.status_code == 200 else 0) == report["used"]


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
async def test_a_nul_in_a_text_is_a_character_like_any_other(path: str, url: str, tmp_path: Path):
    """Load generators draw prompts from all tokens; Postgres keeps no NUL, so its log leaves it out."""
    given: dict[str, Any] = {"database": {"url": url}, "logging": {"store_text": True}, "cache": {"persistent": True}}
    body = {"prompt": "a\x00b", "max_tokens": 20, "temperature": 0}
    async with running(tmp_path, **given) as service:
        async with service.client() as http:
            first, second = [await http.post(path, json=body) for _ in range(2)]
        async with asyncio.timeout(HANG_SECONDS):
            while await logged(service) != 2:  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.05)
        async with service.access.database.read() as connection:
            rows = (await connection.execute(select(inference_log.c.prompt, inference_log.c.answer))).all()

    assert [200, 200] == [first.status_code, second.status_code]
    assert "a\\u0000b" in first.text
    assert "a\\u0000b" in second.text
    assert [("ab", "ab")] * 2 == [tuple(row) for row in rows]


@pytest.mark.services
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [8, pytest.param(30, marks=pytest.mark.soak)])
async def test_a_stalled_postgres_slows_no_request_down(
    seconds: float, postgres: Postgres, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Neither its key nor its line of the log waits for it, and afterwards every line is there."""
    # Longer than the database's own limit of two seconds: one that waits at all waits as long as that.
    monkeypatch.setattr(authenticator, "KNOWN_WAIT_SECONDS", 10)
    loop = asyncio.get_running_loop()
    async with running(tmp_path, patience=WAIT_SECONDS, database={"url": postgres_url}) as service:
        keys = [ADMIN_KEY, await service.key()]
        took = []

        async def send(key: str) -> None:
            began = loop.time()
            assert 200 == (await service.generate(key)).status_code
            took.append(loop.time() - began)

        for key in keys:
            await send(key)
        with postgres.stalled():
            end = loop.time() + seconds
            while loop.time() < end:
                for key in keys:
                    await send(key)
                await asyncio.sleep(0.02)
        async with asyncio.timeout(HANG_SECONDS):
            while await logged(service) != len(took):  # noqa: ASYNC110  # another task's work
                await asyncio.sleep(0.1)

    assert sorted(took)[-3] < 1.5  # the machine may have stood still once or twice
    assert len(took) > seconds


async def logged(service: Running) -> int:
    """Count the answers in the log."""
    try:
        async with service.access.database.read() as connection:
            return int(await connection.scalar(select(func.count()).select_from(inference_log)) or 0)
    except StoreUnavailable:
        return -1
