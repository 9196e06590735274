"""The configurations of nginx and Caddy in deploy/, by the real programs in front of the real service."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Service
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.e2e

DEPLOY = Path(__file__).parents[2] / "deploy"
Proxy = Callable[[Path, str, int], list[str]]


class SlowStream(ThreadingHTTPServer):
    """A server that sends one event, a second one when it is told to, and then waits for the hang-up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.proceed, self.hung_up = threading.Event(), threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowStream

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._send("data: 1\n\n")
        self.server.proceed.wait(10)
        self._send("data: 2\n\n")
        self.close_connection = True
        self.connection.settimeout(10)
        if not self.connection.recv(1):
            self.server.hung_up.set()

    def _send(self, event: str) -> None:
        self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        pass


def program(name: str) -> str:
    """Return where a program is; without it the test is skipped, except in CI."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        if os.environ.get("REQUIRE_SERVICES"):
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed")
    return found


def certificate(folder: Path) -> tuple[Path, Path]:
    pem, key = folder / "server.pem", folder / "server.key"
    command = [
        program("openssl"),
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-subj", "/CN=llm.example.org", "-days", "1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True)
    return pem, key


def nginx(folder: Path, backend: str, port: int) -> list[str]:
    """Return the command that runs nginx with our configuration, on another port and with another certificate."""
    pem, key = certificate(folder)
    site = (DEPLOY / "nginx/llm-service.conf").read_text()
    for ours, here in (
        ("127.0.0.1:8000", backend),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("/etc/ssl/llm.example.org.pem", str(pem)),
        ("/etc/ssl/llm.example.org.key", str(key)),
    ):
        assert ours in site
        site = site.replace(ours, here)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = f"daemon off; pid {folder}/pid; error_log stderr; events {{}} http {{ access_log off; {temporary} {site} }}"
    (folder / "nginx.conf").write_text(whole)
    return [program("nginx"), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, backend: str, port: int) -> list[str]:
    """Return the command that runs Caddy with our configuration, on another port and with a certificate of its own."""
    site = (DEPLOY / "caddy/Caddyfile").read_text()
    assert "llm.example.org {" in site
    site = site.replace("127.0.0.1:8000", backend).replace(
        "llm.example.org {", f"https://127.0.0.1:{port} {{\n\ttls internal"
    )
    options = (
        f"{{\n\tadmin off\n\tskip_install_trust\n\tauto_https disable_redirects\n\tstorage file_system {folder}\n}}\n"
    )
    (folder / "Caddyfile").write_text(re.sub(r"^#.*\n", "", options + site, flags=re.MULTILINE))
    return [program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[httpx.Client]:
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            # Whose certificate it is is not what is tested.
            options: dict[str, Any] = {"verify": False, "timeout": 30, "trust_env": False}
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", **options) as client:

                def answers() -> bool:
                    assert process.poll() is None, (folder / "log").read_text()
                    try:
                        return client.get("/health").status_code == 200
                    except httpx.TransportError:
                        return False

                wait_for(answers)
                yield client
        finally:
            process.terminate()


@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "caddy"])
def test_a_reverse_proxy_hands_on_each_event_at_once_and_a_hang_up_too(tmp_path: Path, proxy: Proxy):
    """The second event is not sent before the first one has arrived."""
    port = free_port()
    with SlowStream() as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        command = proxy(tmp_path, f"127.0.0.1:{upstream.server_port}", port)
        with running(command, tmp_path, port) as client:
            with client.stream("POST", "/v1/chat", json={}) as stream:
                events = (line for line in stream.iter_lines() if line)
                assert "data: 1" == next(events)
                upstream.proceed.set()
                assert "data: 2" == next(events)
            assert upstream.hung_up.wait(5)
        upstream.shutdown()


@pytest.mark.parametrize("proxy", [nginx, caddy], ids=["nginx", "caddy"])
def test_behind_a_reverse_proxy_the_service_answers_and_refuses_in_its_own_words(
    service: Service, tmp_path: Path, proxy: Proxy
):
    port = free_port()
    with running(proxy(tmp_path, service.url.removeprefix("http://"), port), tmp_path, port) as client:
        client.headers.update(service.client.headers)
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}

        answered = client.post("/v1/chat", json=body)
        streamed = client.post("/v1/chat", json=body | {"stream": True})
        refused = client.post("/v1/chat", json={"messages": [{"role": "user", "content": "x" * 2_000_000}]})

    assert "The capital of France is Paris." == answered.json()["message"]["content"]
    assert answered.headers["x-request-id"] == answered.json()["request_id"]
    assert "event: done" in streamed.text
    assert (413, "payload_too_large") == (refused.status_code, refused.json()["error"])
