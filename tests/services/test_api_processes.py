"""Several API processes on one socket: they share limits, one that dies is replaced, and all end together."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.services.process import ServiceProcess, refused_start, serving
from tests.services.redis_server import RedisServer
from tests.waiting import START_SECONDS, until

pytestmark = [pytest.mark.e2e, pytest.mark.services]

WORKERS: dict[str, Any] = {"APP__WORKERS": "2", "RATE_LIMIT__ENABLED": "true"}


def listening(service: ServiceProcess) -> set[int]:
    """Return the processes that accept connections."""
    children = psutil.Process(service.process.pid).children()
    port = int(service.address.rpartition(":")[2])
    return {child.pid for child in children if _listens(child, port)}


def _listens(process: psutil.Process, port: int) -> bool:
    # It may end, or be killed by a test, at any moment.
    with suppress(psutil.NoSuchProcess):
        return any(each.laddr and each.laddr.port == port for each in process.net_connections("tcp"))
    return False


async def send(service: ServiceProcess, key: str) -> int:
    """Send one request over a connection of its own."""
    async with service.client(key) as http:
        return (await http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 2})).status_code


async def test_processes_share_limits_and_one_that_dies_is_replaced(redis: RedisServer, tmp_path: Path):
    """While one is gone the other serves, limits are what they were, and SIGTERM ends all of them cleanly."""
    async with serving(None, tmp_path, REDIS__URL=redis.url, REDIS__TIMEOUT_SECONDS="0.25", **WORKERS) as service:
        await until(lambda: len(listening(service)) == 2, START_SECONDS)
        async with service.client() as http:
            created = await http.post("/v1/keys", json={"limits": {"requests_per_minute": 5}})
        key = created.json()["key"]
        first = await asyncio.gather(*(send(service, key) for _ in range(16)))
        victim, survivor = sorted(listening(service))
        psutil.Process(victim).kill()
        await until(lambda: victim not in listening(service))
        during = await send(service, key)
        await until(lambda: len(listening(service)) == 2, START_SECONDS)
        again = listening(service)
        code = await asyncio.to_thread(service.stop)

    assert 5 == sum(status == 200 for status in first)
    assert 429 == during
    assert survivor in again
    assert victim not in again
    assert 0 == code
    assert 1 == service.output.read_text().count("is ready: ")
    assert not any(psutil.pid_exists(pid) for pid in again)


@pytest.mark.soak
async def test_processes_end_with_the_one_that_started_them(redis: RedisServer, tmp_path: Path):
    """Killed, it cannot tell them."""
    async with serving(None, tmp_path, REDIS__URL=redis.url, **WORKERS) as service:
        await until(lambda: len(listening(service)) == 2, START_SECONDS)
        processes = listening(service)
        service.kill()
        await until(lambda: not any(psutil.pid_exists(pid) for pid in processes))


def test_several_processes_without_redis_are_refused(tmp_path: Path):
    assert "2 processes" in refused_start(None, tmp_path, APP__WORKERS="2")


@pytest.mark.soak
async def test_without_sessions_processes_that_limit_alone_can_be_asked_for(tmp_path: Path):
    given: dict[str, Any] = {"CHAT_HISTORY__ENABLED": "false", "RATE_LIMIT__PER_PROCESS": "true", **WORKERS}
    async with serving(None, tmp_path, **given) as service:
        await until(lambda: len(listening(service)) == 2, START_SECONDS)
