"""Both databases and Redis, each test with an empty one of its own; the servers that a machine lacks skip tests."""

import os
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path

import pytest

from app.access.background import BackgroundGroup
from app.access.database import Database
from tests.services.disks import Disk, LimitedWrites, small_disk
from tests.services.mlflow_server import MlflowServer, has_server
from tests.services.mlflow_server import running as mlflow_running
from tests.services.postgres import Postgres, binaries, running
from tests.services.redis_connections import RedisConnections, wait_longer
from tests.services.redis_server import RedisServer, program
from tests.services.redis_server import running as redis_running

_numbers = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests.  REQUIRE_SERVICES, which CI sets, turns its absence into a failure."""
    programs = binaries()
    if programs is None:
        reason = "there is no Postgres on this machine (Debian: apt-get install postgresql)"
        if os.environ.get("REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running(programs) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow() -> Iterator[MlflowServer]:
    """One server for all tests; its absence is a skip or a failure as that of Postgres."""
    if not has_server():
        reason = "the MLflow server is not installed (make mlflow-server)"
        if os.environ.get("REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    with mlflow_running() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests; its absence is a skip or a failure as that of Postgres."""
    found = program()
    if found is None:
        reason = "there is no Redis on this machine (Debian: apt-get install redis-server)"
        if os.environ.get("REQUIRE_SERVICES"):
            pytest.fail(reason)
        pytest.skip(reason)
    with redis_running(found) as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> RedisServer:
    """The same, empty; a test that kills it starts it again."""
    redis_server.flush()
    return redis_server


@pytest.fixture
def patient_redis(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """The same for services that wait longer for it than they may: a busy machine is no outage."""
    wait_longer(monkeypatch)
    return redis


@pytest.fixture
async def redis_connections(redis: RedisServer) -> AsyncIterator[RedisConnections]:
    """Connections to it, which are closed when the test ends."""
    connections = RedisConnections(redis.url)
    yield connections
    await connections.close()


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    return postgres.database(f"test{next(_numbers)}")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'service.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.services)])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database of either kind."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """The same with its tables."""
    database = Database(url)
    await database.migrate()
    yield database
    await database.close()


@pytest.fixture
async def background() -> AsyncIterator[BackgroundGroup]:
    """The tasks of one replica."""
    group = BackgroundGroup()
    await group.start()
    yield group
    await group.close()


@pytest.fixture(params=["small disk", "limited writes"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A folder whose disk can be filled: where nothing may be mounted, by a limit of the process that writes to it."""
    if request.param == "limited writes":
        yield LimitedWrites(tmp_path / "disk")
        return
    with small_disk(tmp_path / "disk") as mounted:
        yield mounted
