"""A disk without room under the data folder, while the service runs and when it starts."""

import asyncio
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services.disks import Disk, LimitedWrites
from tests.services.process import FLUSH_SECONDS, ServiceProcess, refused_start, serving
from tests.waiting import HANG_SECONDS, until
from tests.web.access import ADMIN_KEY


@dataclass
class Load:
    """What clients were told."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    refusals: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)
    tokens: int = 0
    """Of the key with a quota."""

    async def run(self, service: ServiceProcess, key: str, stop: asyncio.Event) -> None:
        """Generate with and without a quota, and create keys, until `stop`."""
        async with service.client() as http:
            while not stop.is_set():
                for name, path, body, caller in (
                    ("quota", "/v1/generate", {"prompt": "hello", "max_tokens": 9, "cache": False}, key),
                    ("free", "/v1/generate", {"prompt": "hello", "max_tokens": 9, "cache": False}, ADMIN_KEY),
                    ("create", "/v1/keys", {"role": "free"}, ADMIN_KEY),
                ):
                    reply = await http.post(path, json=body, headers={"X-API-Key": caller})
                    self.note(name, reply)

    def note(self, name: str, reply: httpx.Response) -> None:
        self.statuses[name, reply.status_code] += 1
        body = reply.json()
        if reply.status_code == 503:
            self.refusals.add(body["message"])
            assert reply.headers["Retry-After"]
        elif name == "create":
            self.keys.add(body["id"])
        else:
            self.requests.add(body["request_id"])
            self.tokens += body["usage"]["total_tokens"] if name == "quota" else 0


@dataclass
class Stored:
    """What the database holds."""

    keys: set[str]
    requests: set[str]
    used: int
    reserved: int

    @classmethod
    def of(cls, path: Path, key: str) -> "Stored":
        database = sqlite3.connect(path)
        with closing(database):
            keys = {row[0] for row in database.execute("SELECT id FROM api_keys")}
            requests = {row[0] for row in database.execute("SELECT request_id FROM inference_log")}
            counter = "SELECT used, reserved FROM usage_counters WHERE key_id = ?"
            used, reserved = database.execute(counter, [key.split("_")[1]]).fetchone()
        return cls(keys, requests, used, reserved)


async def said_of_the_database(http: httpx.AsyncClient, wanted: Callable[[str], bool]) -> str:
    """Wait until /status says of the database what is wanted, and return it."""
    async with asyncio.timeout(HANG_SECONDS):
        while not wanted(text := (await http.get("/status")).json()["database"]):  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.02)
    return str(text)


def enough(statuses: Counter[tuple[str, int]]) -> bool:
    """Whether each kind of request was answered as it should be on a full disk, again and again."""
    return all(statuses[each] > 20 for each in (("free", 200), ("quota", 503), ("create", 503)))


def is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


async def test_a_disk_that_fills_up_costs_refusals_and_nothing_that_was_acknowledged(disk: Disk, tmp_path: Path):
    """Writers get 503 with the reason, everybody else is served; with room again all is well, without a restart."""
    log = disk.folder / "log"
    settings: dict[str, Any] = {
        "APP__DATA_DIR": str(disk.folder),
        "LOGGING__FILE": str(log),
        "LOGGING__MAX_BYTES": "2000000",
    }
    load, stop = Load(), asyncio.Event()
    async with serving(None, tmp_path, **settings) as service, service.client() as http:
        key = (await http.post("/v1/keys", json={"limits": {"monthly_tokens": 10**9}})).json()["key"]
        clients = [asyncio.create_task(load.run(service, key, stop)) for _ in range(4)]
        await asyncio.sleep(0.5)
        disk.fill(service)
        fault = await said_of_the_database(http, lambda text: text != "ok")
        ready = await http.get("/readyz")
        before = load.statuses.copy()
        await until(lambda: enough(load.statuses - before))
        during = load.statuses - before
        disk.free(service)
        began = time.monotonic()
        await said_of_the_database(http, lambda text: text == "ok")
        body = {"prompt": "hello", "max_tokens": 9, "cache": False}
        post = partial(http.post, "/v1/generate", json=body, headers={"X-API-Key": key})
        async with asyncio.timeout(HANG_SECONDS):
            while (reply := await post()).status_code != 200:  # noqa: ASYNC110  # a machine that is too busy for it
                await asyncio.sleep(0.02)
        load.note("quota", reply)
        recovered = time.monotonic() - began
        stop.set()
        await asyncio.gather(*clients)
        await asyncio.sleep(3 * FLUSH_SECONDS)
        last = await http.get("/health", headers={"X-Request-ID": "the-last-one"})
        code = service.stop()
    stored = Stored.of(disk.folder / "service.db", key)

    assert fault in ("has no room left on its disk", "cannot be written")
    assert (200, {"status": "ready", "database": fault}) == (ready.status_code, ready.json())
    # On a busy machine a transaction also takes too long, for which SQLite has one reason only.
    busy = {"The service's database is locked by another program; try again in a moment."}
    assert {f"The service's database {fault}; try again in a moment."} == load.refusals - busy
    assert {200, 201, 503} == {status for _, status in load.statuses}
    assert during["quota", 200] + during["create", 201] < 10
    assert recovered < 20  # by itself, without a restart
    assert 0 == code
    assert set() == load.keys - stored.keys
    assert set() == load.requests - stored.requests
    assert (load.tokens, 0) == (stored.used, stored.reserved)
    lines = log.read_text().splitlines()
    whole = [line for line in lines if is_json(line)]
    # Lines were lost while there was no room; one may be cut off, and those behind it are whole.
    assert len(lines) - len(whole) <= 2
    assert "the-last-one" in "".join(whole[-12:])
    assert 200 == last.status_code


async def test_a_service_that_is_stopped_on_a_full_disk_says_what_it_could_not_write(disk: Disk, tmp_path: Path):
    """It waits a few seconds for room and ends as usual."""
    async with serving(None, tmp_path, APP__DATA_DIR=str(disk.folder)) as service, service.client() as http:
        disk.fill(service)
        for _ in range(20):
            assert 200 == (await http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 9})).status_code
        await asyncio.sleep(2 * FLUSH_SECONDS)
        began = time.monotonic()
        code = service.stop()
        took = time.monotonic() - began

    assert 0 == code
    assert took < 20
    if not isinstance(disk, LimitedWrites):  # where not even its output can be written
        (lost,) = [line for line in service.output.read_text().splitlines() if "were lost at the end" in line]
        assert 20 == json.loads(lost)["items"]


@pytest.mark.parametrize(
    ("disk", "bootstrap"),
    [
        ("small disk", True),
        ("limited writes", False),
        pytest.param("small disk", False, marks=pytest.mark.soak),
        pytest.param("limited writes", True, marks=pytest.mark.soak),
    ],
    indirect=["disk"],
)
def test_a_start_without_room_ends_with_a_line_and_the_next_one_with_room_serves(
    disk: Disk, tmp_path: Path, bootstrap: bool
):
    """Be it the key's file or the tables that do not fit; half a file of either does not stand in the way."""
    settings: dict[str, Any] = {"APP__DATA_DIR": str(disk.folder)} | ({"SECURITY__API_KEY": ""} if bootstrap else {})
    disk.fill()
    line = refused_start(None, tmp_path, prepare=disk.prepare, **settings)
    left = {path.name for path in disk.folder.iterdir()} - {"filler"}
    disk.free()

    async def serve() -> int:
        async with serving(None, tmp_path, **settings) as service:
            key = (disk.folder / "api_key").read_text().strip() if bootstrap else ADMIN_KEY
            async with service.client(key) as http:
                return (await http.get("/v1/keys")).status_code

    assert str(disk.folder / ("api_key" if bootstrap else "service.db")) in line
    assert any(reason in line for reason in ("No space left", "File too large", "full", "disk I/O error"))
    assert set() == left - {"service.db", "service.db-wal", "service.db-shm"}
    assert 200 == asyncio.run(serve())
