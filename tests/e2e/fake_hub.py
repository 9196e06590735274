"""A hub on this machine: serves folders as models, some of them only to those who send a token."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """What it serves, and what it was asked."""

    models: dict[str, Path]
    gated: dict[str, str] = field(default_factory=dict)
    """Model -> the token that opens it."""
    slow: set[str] = field(default_factory=set)
    """Models whose weights come to a halt in the middle."""
    halted: threading.Event = field(default_factory=threading.Event)
    """Set once they have."""
    url: str = ""
    authorizations: list[str] = field(default_factory=list)
    """Every Authorization header that came."""


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


def _entry(path: Path) -> dict[str, object]:
    oid = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve a hub on a loopback port, as HF_ENDPOINT names one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the base class
            pass

        def _answer(self) -> None:
            hub.authorizations += [value for name, value in self.headers.items() if name.lower() == "authorization"]
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), *(parts[4:6] if len(parts) > 5 else ("revision", "main")))
            elif "/".join(parts[:2]) not in hub.models:
                self._send(404, b"{}")
            else:
                self._file("/".join(parts[:2]), parts[-1])

        def _describe(self, name: str, what: str, revision: str) -> None:
            if name not in hub.models:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif what == "tree":
                self._send(200, json.dumps([_entry(path) for path in _files(hub.models[name])]).encode())
            else:
                files = [{"rfilename": path.name} for path in _files(hub.models[name])]
                body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "private": False}
                self._send(200, json.dumps(body).encode())

        def _file(self, name: str, file: str) -> None:
            path = hub.models[name] / file
            if hub.gated.get(name) not in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
                self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif not path.is_file():
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            else:
                content = path.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                halt = name in hub.slow and file.endswith(".safetensors") and self.command == "GET"
                self._send(200, content, headers, halt=halt)

        def _send(
            self, status: int, content: bytes, headers: dict[str, str] | None = None, *, halt: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if halt:
                self.wfile.write(content[: len(content) // 2])
                hub.halted.set()
                self.rfile.read(1)  # until the client is gone
            elif self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
