"""SQLite files that are damaged, locked or not writable, wrong clocks, and two services on one folder."""

import asyncio
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.services.process import ROOT, ServiceProcess, as_ordinary_user, refused_start, serving
from tests.web.access import ADMIN_KEY

PROMPT = {"prompt": "hello", "max_tokens": 9, "cache": False}


async def generate(service: ServiceProcess, key: str = ADMIN_KEY) -> int:
    async with service.client(key) as http:
        return (await http.post("/v1/generate", json=PROMPT)).status_code


async def make_key(service: ServiceProcess, **fields: object) -> str:
    async with service.client() as http:
        created = await http.post("/v1/keys", json=fields)
    assert 201 == created.status_code, created.text
    key: str = created.json()["key"]
    return key


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed database of a service that has run, with a hundred keys."""
    folder = tmp_path_factory.mktemp("grown")

    async def fill() -> None:
        async with serving(None, folder, APP__DATA_DIR=str(folder / "data")) as service:
            for number in range(100):  # one after the other: a busy machine's disk takes its time
                await make_key(service, owner=f"owner {number}")
                await generate(service)
            assert 0 == service.stop()

    asyncio.run(fill())
    return folder / "data" / "service.db"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100)


def flip_bytes(path: Path) -> None:
    """Turn random bytes over in the beginning of every page but the first, where its structure is described."""
    draw, data = random.Random(1), bytearray(path.read_bytes())
    for page in range(4096, len(data), 4096):
        for _ in range(4):
            data[page + draw.randrange(12)] ^= 0xFF
    path.write_bytes(data)


def flip_one_table(path: Path) -> None:
    """Damage only a page that a start has no need to read."""
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'inference_log'").fetchone()
    data = bytearray(path.read_bytes())
    for place in range((page - 1) * 4096, (page - 1) * 4096 + 12):
        data[place] ^= 0xFF
    path.write_bytes(data)


def become_text(path: Path) -> None:
    path.write_text("This is no database, but as long as one. " * 1000)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [
        (truncate, ("malformed", "damaged")),
        (become_folder, ("Is a directory",)),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                (flip_bytes, ("malformed", "damaged")),
                (flip_one_table, ("malformed", "damaged")),
                (become_text, ("not a database",)),
            )
        ),
    ],
)
def test_a_spoilt_database_stops_the_start_with_a_line_that_says_what_to_do(
    grown: Path, tmp_path: Path, spoil: Callable[[Path], None], reasons: tuple[str, ...]
):
    """And leaves the file as it is, for whoever wants to save what is in it."""
    path = tmp_path / "service.db"
    shutil.copy(grown, path)
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""

    line = refused_start(None, tmp_path, APP__DATA_DIR=str(tmp_path))

    assert str(path) in line
    assert any(reason in line for reason in reasons)
    assert "restore a copy" in line or "writable" in line
    assert before == (path.read_bytes() if path.is_file() else b"")


async def test_an_empty_file_becomes_a_database(tmp_path: Path):
    """As `touch`, or a start that was killed at once, leaves it."""
    (tmp_path / "service.db").touch()

    async with serving(None, tmp_path, APP__DATA_DIR=str(tmp_path)) as service:
        assert 200 == await generate(service, await make_key(service))


async def test_a_database_that_is_damaged_while_it_is_served_answers_503_and_says_why(grown: Path, tmp_path: Path):
    """Requests that need no row of it go on; none is answered with 500."""
    path = tmp_path / "service.db"
    shutil.copy(grown, path)
    statuses = set()
    async with serving(None, tmp_path, APP__DATA_DIR=str(tmp_path)) as service, service.client() as http:
        key = await make_key(service, limits={"monthly_tokens": 10**6})
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        flip_bytes(path)
        for _ in range(10):
            statuses |= {await generate(service, key)}
            for method, url, body in (("GET", "/v1/keys", None), ("POST", "/v1/keys", {}), ("GET", "/v1/usage", None)):
                reply = await http.request(method, url, json=body)
                statuses.add(reply.status_code)
                if reply.status_code == 503:
                    assert "database is damaged" in reply.json()["message"]
        unlimited = await generate(service)
        said = (await http.get("/readyz")).json()
        assert 0 == service.stop()

    assert 503 in statuses
    assert statuses <= {200, 201, 503}
    assert 200 == unlimited
    assert {"status": "ready", "database": "is damaged"} == said


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written_stops_the_start_with_a_line_that_names_it(grown: Path, tmp_path: Path, what: str):
    """A folder or a file of another user, or on a disk that is mounted for reading only."""
    data = tmp_path / "data"
    data.mkdir()
    if what == "file":
        shutil.copy(grown, data / "service.db")
        (data / "service.db").chmod(0o400)
    data.chmod(0o500)

    line = refused_start(None, tmp_path, prepare=as_ordinary_user, APP__DATA_DIR=str(data))
    data.chmod(0o700)

    assert str(data / "service.db") in line
    assert "writable" in line
    assert "APP__DATA_DIR" in line


async def test_a_folder_that_becomes_read_only_refuses_nothing_that_it_need_not(tmp_path: Path):
    """The files are open: SQLite goes on, and so does the service."""
    data = tmp_path / "data"
    async with serving(None, tmp_path, prepare=as_ordinary_user, APP__DATA_DIR=str(data)) as service:
        key = await make_key(service, limits={"monthly_tokens": 10**6})
        data.chmod(0o500)
        statuses = {await generate(service, key) for _ in range(5)}
        data.chmod(0o700)
        assert 0 == service.stop()

    assert {200} == statuses


async def test_a_database_that_another_program_locks_is_named_and_used_again_when_it_is_free(tmp_path: Path):
    """Meanwhile keys are verified, a key with a quota gets 503 with the reason; afterwards all is counted."""
    async with serving(None, tmp_path, APP__DATA_DIR=str(tmp_path)) as service, service.client() as http:
        key, other = await make_key(service, limits={"monthly_tokens": 10**6}), await make_key(service)
        assert 200 == await generate(service, key)
        with closing(sqlite3.connect(tmp_path / "service.db", isolation_level=None)) as locking:
            locking.execute("BEGIN IMMEDIATE")
            async with service.client(key) as limited:
                refused = await limited.post("/v1/generate", json=PROMPT)
            unlimited = [await generate(service, other) for _ in range(3)]
            status = (await http.get("/status")).json()["database"]
            locking.execute("ROLLBACK")
        while (code := await generate(service, key)) == 503:  # noqa: ASYNC110  # the breaker's probe has no event
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        assert 0 == service.stop()
    with closing(sqlite3.connect(tmp_path / "service.db")) as database:
        (used,) = database.execute("SELECT used FROM usage_counters WHERE key_id = ?", [key.split("_")[1]]).fetchone()
        (rows,) = database.execute("SELECT count(*) FROM inference_log WHERE status = 200").fetchone()

    assert 503 == refused.status_code
    assert "locked by another program" in refused.json()["message"]
    assert [200] * 3 == unlimited
    assert "is locked by another program" == status
    assert 200 == code
    assert (20, 5) == (used, rows)


async def test_two_services_on_one_folder_share_the_first_key_and_count_together(tmp_path: Path):
    """Started at once on an empty folder, under load, and one of them killed."""
    given: dict[str, Any] = {"APP__DATA_DIR": str(tmp_path / "data"), "SECURITY__API_KEY": ""}
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with serving(None, folders[0], **given) as one, serving(None, folders[1], **given) as two:
        admin = (tmp_path / "data" / "api_key").read_text().strip()
        async with one.client(admin) as http:
            key = (await http.post("/v1/keys", json={"limits": {"monthly_tokens": 400}})).json()["key"]
        replies = await asyncio.gather(*(generate(service, key) for _ in range(30) for service in (one, two)))
        one.kill()
        while (status := await generate(two, key)) == 200:
            replies.append(status)
        async with two.client(admin) as http:
            usage = (await http.get("/v1/usage", params={"key": key.split("_")[1]})).json()
            keys = (await http.get("/v1/keys")).status_code

    assert {200, 429} == set(replies)
    # Each takes ten tokens in the end, and is let in while the fourteen that it could take are left.
    assert (390, 0) == (usage["used"], usage["reserved"])
    assert 39 == replies.count(200)
    assert 429 == status
    assert 200 == keys


CLOCK = """
import datetime, pathlib
_real, _file = datetime.datetime, pathlib.Path(%r)
class _Shifted(_real):
    @classmethod
    def now(cls, tz=None):
        return _real.now(tz) + datetime.timedelta(seconds=float(_file.read_text()))
datetime.datetime = _Shifted
"""
"""Python reads it before anything else: the wall clock is as wrong as a file says."""


@pytest.fixture
def clock(tmp_path: Path) -> Callable[[timedelta], None]:
    """Set the wall clock of the services of this test, as NTP or an operator does while they run."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK % str(folder / "offset"))

    def set_clock(offset: timedelta) -> None:
        draft = folder / "draft"
        draft.write_text(str(offset.total_seconds()))
        draft.replace(folder / "offset")

    set_clock(timedelta())
    return set_clock


@pytest.mark.parametrize(
    "jump",
    [
        timedelta(days=45),
        timedelta(hours=-1),
        pytest.param(timedelta(hours=1), marks=pytest.mark.soak),
        pytest.param(timedelta(days=-45), marks=pytest.mark.soak),
    ],
    ids=str,
)
async def test_a_clock_that_jumps_locks_nobody_out_and_loses_no_token(
    tmp_path: Path, clock: Callable[[timedelta], None], jump: timedelta
):
    """Forth and back, also over the end of a month: tokens count for the month that it was.  What a process had
    reserved that died while its clock was wrong is released, however late its lease would end."""
    given: dict[str, Any] = {
        "APP__DATA_DIR": str(tmp_path),
        "PYTHONPATH": f"{tmp_path / 'clock'}:{ROOT}",
        "QUOTA__LEASE_SECONDS": "1",
    }
    statuses = []
    async with serving(None, tmp_path, **given) as service:
        key = await make_key(service, limits={"monthly_tokens": 10**6})
        for offset in (timedelta(), jump, timedelta(), jump):
            clock(offset)
            statuses += await asyncio.gather(*(generate(service, key) for _ in range(4)))
    with closing(sqlite3.connect(tmp_path / "service.db")) as database:
        future = (datetime.now(UTC) + timedelta(days=3000)).replace(tzinfo=None)
        month = datetime.now(UTC).strftime("%Y-%m")
        database.execute("INSERT INTO reservations VALUES ('r', ?, ?, 500, ?)", [key.split("_")[1], month, str(future)])
        database.execute("UPDATE usage_counters SET reserved = reserved + 500 WHERE month = ?", [month])
        database.commit()
    clock(timedelta())
    async with serving(None, tmp_path, **given) as service:
        statuses += [await generate(service, key)]
        await asyncio.sleep(1.5)
    with closing(sqlite3.connect(tmp_path / "service.db")) as database:
        counters = dict(database.execute("SELECT month, used FROM usage_counters WHERE key_id != 'admin'").fetchall())
        (reserved,) = database.execute("SELECT sum(reserved) FROM usage_counters").fetchone()
        (left,) = database.execute("SELECT count(*) FROM reservations WHERE tokens > 0").fetchone()

    months = {f"{datetime.now(UTC) + offset:%Y-%m}" for offset in (timedelta(), jump)}
    assert {200} == set(statuses)
    assert months == set(counters)
    assert 10 * 17 == sum(counters.values())
    assert (0, 0) == (reserved, left)
