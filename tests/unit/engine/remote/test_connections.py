"""How servers are reached: over connections that are kept, through the proxy of the environment."""

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.engine.remote import connections
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import CARD, DONE, QUICK, chunk, make_engine, usage
from tests.unit.event_streams import read, text_of
from tests.waiting import HANG_SECONDS, START_SECONDS, until

ANSWER = (chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), usage(7, 2), DONE)


@dataclass
class KeepingServer:
    """Answers all requests of a connection; the last bytes of a stream come after a pause."""

    url: str = ""
    pause_seconds: float = 0.02
    open: int = 0
    connections: int = 0
    targets: list[str] = field(default_factory=list)
    """What the first lines of the requests for completions name."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self._answer(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        self.open -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        await reader.readexactly(int(headers.get("content-length", 0)))
        if "/v1/models" in first:
            body = json.dumps({"data": [CARD]}).encode()
            writer.write(b"HTTP/1.1 200 -\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            return
        self.targets.append(first.split()[1])
        writer.write(b"HTTP/1.1 200 -\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in ANSWER:
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        # Ends the wait when the client hangs up, and then the connection.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.pause_seconds):
                await reader.readexactly(1)
        writer.write(b"0\r\n\r\n")


@asynccontextmanager
async def keeping(server: KeepingServer, tls: ssl.SSLContext | None = None) -> AsyncIterator[KeepingServer]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{port}/v1"
    try:
        yield server
    finally:
        listener.close()
        await until(lambda: server.open == 0)


async def answers_of(url: str, times: int = 1, pause: float = 0.0) -> list[str]:
    """Return the answers of a server to some requests, one after the other."""
    engine = make_engine(deadlines=QUICK, base_urls=[url])
    await engine.start()
    try:
        await engine.wait_ready()
        answers = []
        for number in range(times):
            answers.append(text_of(await read(engine.stream(make_request(f"r{number}")))))
            await asyncio.sleep(pause)
        return answers
    finally:
        await engine.close()


async def test_one_connection_serves_one_request_after_the_other() -> None:
    """Although the last bytes of a response come only after the server has said that it is over."""
    async with keeping(KeepingServer()) as server:
        answers = await answers_of(server.url, times=4, pause=0.1)

    assert ["Hello"] * 4 == answers
    assert 1 == server.connections


async def test_an_answer_does_not_wait_for_the_last_bytes_of_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a moment to come; then the connection is closed."""
    monkeypatch.setattr(connections, "LINGER_SECONDS", 0.1)
    async with keeping(KeepingServer(pause_seconds=60)) as server:
        engine = make_engine(deadlines=QUICK, base_urls=[server.url])
        await engine.start()
        await engine.wait_ready()
        async with asyncio.timeout(HANG_SECONDS):
            assert "Hello" == text_of(await read(engine.stream(make_request())))
            await until(lambda: server.open == 0)
        await engine.close()


async def test_the_proxy_of_the_environment_is_asked_unless_the_server_is_excepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As everywhere else in the service."""
    async with keeping(KeepingServer()) as proxy, keeping(KeepingServer()) as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("no_proxy", "localhost")
        await answers_of("http://model.example/v1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        await answers_of(server.url)

    assert ["http://model.example/v1/chat/completions"] == proxy.targets
    assert ["/v1/chat/completions"] == server.targets


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", *names]
    public, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["/usr/bin/env", "openssl", "req", "-x509", *kind, "-keyout", str(key), "-out", str(public)]
    subprocess.run(command, check=True, capture_output=True, timeout=START_SECONDS)
    return public, key


async def test_a_server_with_tls_is_believed_by_its_certificate_alone(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE names the authorities, as everywhere else in the service."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    async with keeping(KeepingServer(), tls) as server:
        stranger = make_engine(deadlines=QUICK, base_urls=[server.url])
        await stranger.start()
        await until(lambda: stranger.status().error is not None)
        error = stranger.status().error
        await stranger.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        answers = await answers_of(server.url)

    assert "upstream 1: it cannot be reached" == error
    assert ["Hello"] == answers
