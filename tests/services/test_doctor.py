"""`python -m app doctor` beside real services and databases."""

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from app.access.database import Database
from tests.services.disks import small_disk
from tests.services.postgres import Postgres
from tests.services.process import as_ordinary_user, environment, serving
from tests.services.redis_server import RedisServer
from tests.waiting import START_SECONDS


def examine(
    folder: Path, code: int, *, url: str | None = None, prepare: Callable[[], None] | None = None, **settings: str
) -> str:
    """Run the command in a folder and return what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "app", "doctor"],
        cwd=folder,
        env=environment(url, APP__DATA_DIR=str(folder), **settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        preexec_fn=prepare,
    )
    assert code == ended.returncode, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


async def test_a_running_service_is_found_and_asked(tmp_path: Path):
    """Its database is whole and free while it is used, and nothing of the service is disturbed."""
    async with serving(None, tmp_path, APP__DATA_DIR=str(tmp_path)) as service:
        port = service.address.rpartition(":")[2]

        said = await asyncio.to_thread(examine, tmp_path, 0, APP__PORT=port)

        async with service.client() as http:
            assert 200 == (await http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 9})).status_code
    assert f"runs on port {port} and is ready" in said
    assert f"{tmp_path / 'service.db'} answers, is whole and can be written" in said


def database_in(folder: Path) -> Path:
    async def create() -> None:
        database = Database(f"sqlite:///{folder / 'service.db'}")
        await database.migrate()
        await database.close()

    asyncio.run(create())
    return folder / "service.db"


LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
input()
"""


def test_who_locks_the_database_is_named(tmp_path: Path):
    """By its name and process, never by its command line."""
    path = database_in(tmp_path)
    command = [sys.executable, "-c", LOCK, str(path), "--password=canary"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()

        said = examine(tmp_path, 1, APP__PORT="0")

        process.communicate(b"\n")
    assert "is locked by another program, opened by python" in said, said
    assert f"(process {process.pid})" in said
    assert "canary" not in said


def test_a_database_that_may_not_be_written_is_a_problem(tmp_path: Path):
    path = database_in(tmp_path)
    path.chmod(0o400)
    tmp_path.chmod(0o500)

    said = examine(tmp_path, 1, prepare=as_ordinary_user, APP__PORT="0")

    tmp_path.chmod(0o700)
    assert f"problem  data folder: {tmp_path} cannot be written: Permission denied" in said
    assert f"problem  database: {path} cannot be written" in said


@pytest.mark.parametrize("in_use", [False, True])
def test_a_database_whose_disk_is_full_is_a_problem_that_says_so(tmp_path: Path, in_use: bool):
    """Also where the database is on a disk of its own, and whether a service has it open or not."""
    with small_disk(tmp_path / "disk") as disk:
        path = database_in(disk.folder)
        with closing(sqlite3.connect(path)) as service:
            if in_use:
                service.execute("SELECT * FROM alembic_version").fetchall()
            disk.fill()

            said = examine(tmp_path, 1, url=f"sqlite:///{path}", APP__PORT="0")

    assert f"problem  database: {path} " in said
    assert "room" in said.partition(f"problem  database: {path} ")[2].splitlines()[0]
    assert "problem  database: its disk has 0 MB free" in said
    assert "can be written" not in said


@pytest.mark.services
def test_postgres_is_examined_up_and_down(postgres: Postgres, postgres_url: str, tmp_path: Path):
    """An empty one, one with this program's schema, and one that is not there; it is named without its user."""
    empty = examine(tmp_path, 0, url=postgres_url, APP__PORT="0")
    subprocess.run(
        [sys.executable, "-m", "app", "db", "upgrade"],
        cwd=tmp_path,
        env=environment(postgres_url),
        check=True,
        timeout=START_SECONDS,
    )
    current = examine(tmp_path, 0, url=postgres_url, APP__PORT="0")
    postgres.stop()
    try:
        away = examine(tmp_path, 1, url=postgres_url, APP__PORT="0")
    finally:
        postgres.start()

    assert "the next start brings its schema from nothing to" in empty
    assert "is this program's" in current
    assert f"Postgres on 127.0.0.1, port {postgres.port}" in current
    assert "problem  database: Postgres on 127.0.0.1" in away
    assert "does not answer" in away
    assert "tests@" not in empty + current + away


@pytest.mark.services
def test_redis_is_asked_and_what_is_wrong_with_it_is_said(tmp_path: Path, redis: RedisServer):
    """Without a password of its URL; and several processes without one are a problem."""
    found = examine(tmp_path, 0, REDIS__URL=redis.url)
    redis.command("CONFIG", "SET", "requirepass", "secret")
    try:
        refused = examine(tmp_path, 1, REDIS__URL=redis.url, REDIS__PASSWORD="canary-password")
    finally:
        redis.restart()
    missing = examine(tmp_path, 1, REDIS__REPLICAS="3")

    assert f"Redis at 127.0.0.1:{redis.port} answers and can be written" in found
    assert "refuses the user or the password. To do: set REDIS__PASSWORD" in refused
    assert "canary" not in refused
    assert "3 processes (app.workers times redis.replicas) share nothing" in missing
