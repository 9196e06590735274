"""Every kind of installation that a URL can name, each a real one: TLS, a socket, Sentinel, Cluster, and Valkey."""

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import create_connection

import pytest

from app.access.admission_store import Rates, Refusal
from app.access.token_bucket import Bucket
from app.config import RedisConfig
from app.stores.redis_admission import RedisAdmissionStore
from app.stores.redis_connection import RedisConnection
from tests.ports import free_port
from tests.services.redis_server import RedisServer, program, running
from tests.waiting import HANG_SECONDS, START_SECONDS

pytestmark = pytest.mark.services

RATES = Rates(requests=Bucket(2, 1e-6), tokens=Bucket(100, 1e-6), parallel_requests=5)


async def admitted(url: str, **settings: object) -> list[Refusal | None]:
    """Return what becomes of three requests, where two may be sent."""
    config = RedisConfig.model_validate({"url": url, **settings}).model_copy(update={"timeout_seconds": 10.0})
    connection = RedisConnection(config)
    try:
        store = RedisAdmissionStore(connection, lease_seconds=20)
        await store.take_tokens("k", Bucket(100, 1e-6), 10)
        decisions = await asyncio.gather(*(store.admit("k", RATES) for _ in range(3)))
        for each in decisions:
            if each.place:
                await store.leave(each.place)
        return [each.refused for each in decisions]
    finally:
        await connection.close()


WORKS = [None, None, Refusal.REQUESTS]


@pytest.fixture
def path(redis_server: RedisServer) -> str:
    """The program of the tests' Redis, where there is one."""
    found = program()
    assert found is not None
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="llm-") as name:
        yield Path(name)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate of 127.0.0.1 and its key."""
    public, key = folder / "certificate.pem", folder / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["/usr/bin/env", "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run(
        [*command, "-keyout", str(key), "-out", str(public)], check=True, capture_output=True, timeout=START_SECONDS
    )
    return public, key


async def test_tls_is_spoken_and_a_certificate_that_is_not_trusted_is_refused(path: str, folder: Path):
    public, key = certificate(folder)
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(public)]
    options += ["--tls-cert-file", str(public), "--tls-key-file", str(key)]
    try:
        with running(path, *options):
            url = f"rediss://127.0.0.1:{port}"
            trusted = await admitted(f"{url}?ssl_ca_certs={public}")
            connection = RedisConnection(RedisConfig.model_validate({"url": url}))
            await connection.open()
            fault = connection.fault
            await connection.close()
    except TimeoutError as error:
        if not any(reason in str(error) for reason in ("tls-port", "Failed finding TLS support")):
            raise
        pytest.skip("this Redis was built without TLS")

    assert WORKS == trusted
    assert fault is not None


async def test_a_socket_needs_no_network(path: str, folder: Path):
    socket = folder / "redis.sock"
    with running(path, "--unixsocket", str(socket), "--unixsocketperm", "700"):
        assert WORKS == await admitted(f"unix://{socket}?db=1")


@contextmanager
def sentinel(path: str, folder: Path, server: RedisServer) -> Iterator[int]:
    """Run a Sentinel that knows a server as `main`, and give its port."""
    port, settings = free_port(), folder / "sentinel.conf"
    settings.write_text(f"sentinel monitor main 127.0.0.1 {server.port} 1\nsentinel auth-pass main secret\n")
    command = [path, str(settings), "--sentinel", "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        for _ in range(400):
            with suppress(OSError), create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.025)
        yield port
    finally:
        process.kill()
        process.wait(10)


async def test_sentinels_name_the_server(path: str, folder: Path):
    """One that cannot be reached is passed over."""
    with running(path, "--requirepass", "secret") as server, sentinel(path, folder, server) as port:
        url = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/main/0"
        assert WORKS == await admitted(url, password="secret")


async def test_a_cluster_has_all_keys_of_an_owner_on_one_server(path: str):
    """Every script names keys of one owner only, or it would be refused there."""
    with running(path, "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf") as server:
        server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        async with asyncio.timeout(HANG_SECONDS):
            while b"cluster_state:ok" not in server.command("CLUSTER", "INFO"):  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.05)
        assert WORKS == await admitted(f"redis+cluster://127.0.0.1:{server.port}")


async def test_valkey_is_as_good():
    found = program("valkey")
    if found is None:
        # Not a failure where services are required: Debian has it since release 13.
        pytest.skip("there is no Valkey on this machine (Debian 13: apt-get install valkey-server)")
    with running(found) as server:
        assert WORKS == await admitted(server.url.replace("redis://", "valkey://"))
