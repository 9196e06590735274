"""Batches of services that are killed, and of several services on one database: every line has one result."""

import asyncio
import json
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.process import ServiceProcess, serving
from tests.waiting import START_SECONDS

SETTINGS: dict[str, Any] = {"BATCHES__LEASE_SECONDS": "1", "CACHE__ENABLED": "false"}
CHAT = "/v1/chat/completions"


def lines_of(count: int) -> bytes:
    def line(number: int) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": f"this is line {number} " * 40}], "max_tokens": 300}
        return {"custom_id": f"c{number}", "method": "POST", "url": CHAT, "body": body}

    return "\n".join(json.dumps(line(number)) for number in range(count)).encode()


async def create(service: ServiceProcess, count: int) -> str:
    async with service.client() as http:
        created = await http.post("/v1/batches", content=lines_of(count), headers={"Content-Type": "application/jsonl"})
    assert 200 == created.status_code, created.text
    batch_id: str = created.json()["id"]
    return batch_id


async def counts(http: httpx.AsyncClient, batch_id: str) -> dict[str, Any]:
    batch: dict[str, Any] = (await http.get(f"/v1/batches/{batch_id}")).json()
    return {"status": batch["status"], **batch["request_counts"], "output": batch["output_file_id"]}


async def answered(
    service: ServiceProcess, batch_id: str, least: int, seconds: float = START_SECONDS
) -> dict[str, Any]:
    """Wait until a batch has so many responses, or has ended."""
    async with asyncio.timeout(seconds), service.client() as http:
        while True:
            now = await counts(http, batch_id)
            if now["completed"] >= least or now["status"] == "completed":
                return now
            await asyncio.sleep(0.02)


async def ids_of(service: ServiceProcess, file_id: str) -> list[str]:
    async with service.client() as http:
        content = (await http.get(f"/v1/files/{file_id}/content")).text
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("count", "kills"), [(30, 1), pytest.param(200, 8, marks=pytest.mark.soak)])
async def test_a_batch_survives_the_death_of_its_service(url: str, tmp_path: Path, count: int, kills: int):
    """What was answered stays answered; what was running is answered after the lease; no line twice."""
    batch_id, before = "", 0
    for number in range(kills):
        async with serving(url, tmp_path, **SETTINGS) as service:
            batch_id = batch_id or await create(service, count)
            now = await answered(service, batch_id, before + count // (kills + 1))
            service.kill()
        assert now["completed"] >= before
        before = now["completed"]
        assert number or now["status"] != "completed"
    async with serving(url, tmp_path, **SETTINGS) as service:
        done = await answered(service, batch_id, count)
        await asyncio.sleep(0.2)
        done = await answered(service, batch_id, count + 1)
        found = await ids_of(service, done["output"])
    assert ("completed", count, 0) == (done["status"], done["completed"], done["failed"])
    assert [f"c{number}" for number in range(count)] == found


@pytest.mark.timeout(300)
@pytest.mark.services
async def test_several_services_share_a_batch_and_one_that_dies_leaves_its_lines_to_the_other(
    postgres_url: str, tmp_path: Path
):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(serving(postgres_url, each, **SETTINGS)) for each in folders]
        batch_id = await create(one, 40)
        await answered(two, batch_id, random.randint(5, 15))
        one.kill()
        done = await answered(two, batch_id, 41)
        found = await ids_of(two, done["output"])
    assert [f"c{number}" for number in range(40)] == found


@pytest.mark.timeout(300)
async def test_a_service_that_is_stopped_gives_its_lines_back(sqlite_url: str, tmp_path: Path):
    """Those that do not finish in the grace period, too: the next start waits for no lease."""
    settings = SETTINGS | {"BATCHES__LEASE_SECONDS": "600", "APP__SHUTDOWN_GRACE_SECONDS": "0"}
    async with serving(sqlite_url, tmp_path, **settings) as service:
        batch_id = await create(service, 30)
        await answered(service, batch_id, 5)
        assert 0 == await asyncio.to_thread(service.stop)
    async with serving(sqlite_url, tmp_path, **settings) as service:
        done = await answered(service, batch_id, 31)
        found = await ids_of(service, done["output"])
    assert [f"c{number}" for number in range(30)] == found
