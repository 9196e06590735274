"""Faults of disk, file and process at random moments under load, one after the other, on SQLite."""

import asyncio
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.disks import Disk
from tests.services.process import FLUSH_SECONDS, ServiceProcess, serving
from tests.services.test_disk_full import Load, Stored, said_of_the_database

SLACK_SECONDS = 1.0
"""On a busy machine the log's task may come late to its turn."""
FAULTS = ("disk", "lock", "both", "kill")


async def break_and_mend(fault: str, disk: Disk, service: ServiceProcess, draw: random.Random) -> None:
    """Let one or two faults last for a moment, and wait until the service says that they are over."""
    seconds = draw.uniform(0.1, 3)
    if fault in ("disk", "both"):
        disk.fill(service)
    if fault in ("lock", "both"):
        with closing(sqlite3.connect(disk.folder / "service.db", isolation_level=None, timeout=20)) as database:
            database.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(seconds)
            database.execute("ROLLBACK")
    else:
        await asyncio.sleep(seconds)
    if fault in ("disk", "both"):
        disk.free(service)
    async with service.client() as http:
        await said_of_the_database(http, lambda text: text == "ok")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("disk", "rounds"),
    [
        ("limited writes", 1),
        pytest.param("small disk", 1, marks=pytest.mark.soak),
        *(pytest.param(kind, 60, marks=pytest.mark.chaos) for kind in ("limited writes", "small disk")),
    ],
    indirect=["disk"],
)
async def test_whatever_breaks_under_load_nothing_acknowledged_is_lost(disk: Disk, tmp_path: Path, rounds: int):
    """Keys and charges never; rows of the log but for those of the last moment before the process was killed.  There is
    no status but 200, 201 and 503, and the file is whole in the end."""
    draw = random.Random()
    settings: dict[str, Any] = {"APP__DATA_DIR": str(disk.folder), "QUOTA__LEASE_SECONDS": "1"}
    load, key, unsafe, killed = Load(), "", set[str](), False
    faults = ["kill", *(draw.choice(FAULTS) for _ in range(rounds - 2)), "disk"]
    while faults:
        async with serving(None, tmp_path, **settings) as service, service.client() as http:
            if not key:
                key = (await http.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})).json()["key"]
            stop = asyncio.Event()
            clients = [asyncio.create_task(load.run(service, key, stop)) for _ in range(4)]
            await asyncio.sleep(draw.uniform(0.5, 1.5))
            while faults and (fault := faults.pop(0)) != "kill":
                await break_and_mend(fault, disk, service, draw)
                await asyncio.sleep(draw.uniform(0, 1))
            if killed := fault == "kill":
                await asyncio.sleep(SLACK_SECONDS)
                before = set(load.requests)
                await asyncio.sleep(FLUSH_SECONDS + SLACK_SECONDS)
                service.kill()
                ends = await asyncio.gather(*clients, return_exceptions=True)
                assert all(isinstance(end, httpx.TransportError) for end in ends), ends
                unsafe |= load.requests - before
            else:
                stop.set()
                await asyncio.gather(*clients)
                await asyncio.sleep(2)  # leases of a process that was killed end
                assert 0 == service.stop()
    assert not killed
    stored = Stored.of(disk.folder / "service.db", key)
    with closing(sqlite3.connect(disk.folder / "service.db")) as database:
        assert [("ok",)] == database.execute("PRAGMA integrity_check").fetchall()

    assert {200, 201, 503} >= {status for _, status in load.statuses}
    assert load.tokens > 0
    assert set() == load.keys - stored.keys
    assert set() == load.requests - stored.requests - unsafe
    # What was answered in the moment of a kill may be charged though its client never saw it.
    assert load.tokens <= stored.used
    assert 0 == stored.reserved
