"""Thousands of slow connections beside a client that wants to work, and hostile requests: on the real server."""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse

import pytest

from tests.e2e.conftest import KEY, ROOT, Service, Start
from tests.waiting import HANG_SECONDS
from tests.web.raw_requests import CASES
from tests.web.raw_sockets import exchange, statuses

pytestmark = pytest.mark.e2e

REQUESTS = 200
KEY_OF_TABLE = "web-tests-key-0123456789"


@contextmanager
def few_files(soft: int) -> Iterator[None]:
    """Start processes with the limit of open files that a shell has by default."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def slow_clients(service: Service, count: int) -> Iterator[None]:
    """Keep so many slow connections open until the block ends."""
    port = service.url.rpartition(":")[2]
    command = [sys.executable, "-m", "tests.e2e.slow_clients", port, str(count)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as clients:
        try:
            assert clients.stdout is not None
            assert count == len(clients.stdout.read(count))  # each has been connected once
            yield
        finally:
            clients.kill()


def request(service: Service, count: int) -> list[float]:
    """Send requests, by turns over one connection and over new ones; return how long each response took.

    The one connection may be closed between two of them, as any that is idle: then it is opened again.

    Raises: OSError, http.client.HTTPException: one failed.
    """
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}

    def sent(connection: HTTPConnection, body: str) -> HTTPResponse:
        connection.request("POST", "/v1/generate", body, headers)
        return connection.getresponse()

    port = int(service.url.rpartition(":")[2])
    took = []
    lasting = HTTPConnection("127.0.0.1", port, timeout=30)
    for number in range(count):
        body = json.dumps({"prompt": f"hello {number}", "cache": False})
        began = time.perf_counter()
        connection = lasting if number % 2 else HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            answer = sent(connection, body)
        except ConnectionError:
            if connection is not lasting:
                raise
            lasting.close()
            answer = sent(lasting, body)
        answer.read()
        took.append(time.perf_counter() - began)
        assert 200 == answer.status
        if connection is not lasting:
            connection.close()
    lasting.close()
    return took


@pytest.mark.parametrize(
    ("count", "seconds"), [(1500, 1), pytest.param(2000, 30, marks=[pytest.mark.fuzz, pytest.mark.timeout(300)])]
)
def test_slow_clients_lock_nobody_out(start: Start, count: int, seconds: int) -> None:
    """At the default limit of open files, all from one address: no request fails, and none waits for them."""
    with few_files(1024):
        service = start(MODEL__ENGINE="echo")
    request(service, 20)

    with slow_clients(service, count):
        until = time.monotonic() + seconds
        took = request(service, REQUESTS)
        while time.monotonic() < until:
            took += request(service, REQUESTS)

    assert max(took) < HANG_SECONDS
    assert 'connections_closed_total{reason="evicted"}' in service.get("/metrics").text
    assert 0 == service.stop()


def test_the_server_survives_with_very_few_files(start: Start) -> None:
    """The hard limit cannot be raised: fewer connections have a place, and the socket goes on accepting."""
    command = ["bash", "-c", 'ulimit -n 400; exec "$@"', "serve"]
    service = start(command=command, MODEL__ENGINE="echo")
    with slow_clients(service, 600):
        request(service, REQUESTS // 4)
        time.sleep(1)
        request(service, REQUESTS // 4)

    assert service.logged("few files")
    assert 0 == service.stop()


def test_the_real_server_treats_every_shape_of_request_as_the_tests_do(start: Start, subtests: pytest.Subtests) -> None:
    """The loop and the sockets of production are others than those of the tests."""
    service = start(
        MODEL__ENGINE="echo",
        SECURITY__API_KEY=KEY_OF_TABLE,
        SECURITY__HEAD_TIMEOUT_SECONDS="1",
        SECURITY__BODY_TIMEOUT_SECONDS="1",
    )
    port = int(service.url.rpartition(":")[2])

    async def run() -> None:
        for case in CASES:
            with subtests.test(case.name):
                async with asyncio.timeout(HANG_SECONDS):
                    client, usable = await exchange(port, [case.sent], len(case.statuses), closes=case.closes)
                assert (case.statuses, case.closes) == (statuses(client.answer), not usable)
                assert case.may_reset or not client.reset

    asyncio.run(run())
    assert '"level": "ERROR"' not in service.log.read_text()
    assert 0 == service.stop()
