"""A registry that answers as MLflow's server does, over a real socket, with whatever a test puts into it."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
ROOT = "0/models/m-1/artifacts"
MLMODEL = """\
flavors:
  python_function: {loader_module: mlflow.transformers, python_version: 3.11.7}
  transformers: {code: null, components: [tokenizer], model_binary: model, task: text-generation}
run_id: r1
"""
FILES = {
    "MLmodel": MLMODEL.encode(),
    "requirements.txt": b"transformers\n",
    "model/config.json": b'{"model_type": "llama"}',
    "model/model.safetensors": b"weights" * 1000,
    "model/README.md": b"# not read",
    "components/tokenizer/tokenizer.json": b"{}",
}

Reply = tuple[int, Mapping[str, str], bytes]


@dataclass
class Registry:
    """What the server has: versions of the model `chat`, and files."""

    address: str = ""
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)
    """Other models that have the same versions."""
    aliases: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    """By their paths below the model's folder."""
    artifact_uri: str = f"mlflow-artifacts:/{ROOT}"
    metrics: list[dict[str, Any]] = field(default_factory=list)
    listed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Listings in place of the true ones, by the folder below the model's."""
    replies: dict[str, Callable[[Mapping[str, str]], Reply]] = field(default_factory=dict)
    """Replies in place of the usual ones, by the end of the path."""
    requests: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    """Path and headers of each request."""

    def add(self, version: str, **facts: Any) -> None:
        self.versions[version] = {"name": "chat", "version": version, "status": "READY", "run_id": "r1"} | facts

    def reply(self, path: str, params: Mapping[str, str]) -> Reply:
        for end, make in self.replies.items():
            if path.endswith(end):
                return make(params)
        if path.startswith(f"{ARTIFACTS}/"):
            content = self.files.get(unquote(path).removeprefix(f"{ARTIFACTS}/{ROOT}/"))
            return _missing() if content is None else (200, {}, content)
        if path == ARTIFACTS:
            return found(files=self._list(params["path"].removeprefix(ROOT).strip("/")))
        return self._describe(path.removeprefix(API), params)

    def _describe(self, path: str, params: Mapping[str, str]) -> Reply:
        if path == "runs/get":
            return found(run={"data": {"metrics": self.metrics}})
        if path == "model-versions/get-download-uri":
            return found(artifact_uri=self.artifact_uri)
        if path == "registered-models/get-latest-versions":
            inside = [each for each in self.versions.values() if each.get("current_stage") == params["stages"]]
            return found(model_versions=inside[-1:])
        if path == "registered-models/alias":
            version = self.versions.get(self.aliases.get(params["alias"], ""))
        else:
            version = self.versions.get(params["version"])
            if version is not None and params["name"] in self.copies:
                version = version | {"name": params["name"]}
        return _missing() if version is None else found(model_version=version)

    def _list(self, folder: str) -> list[dict[str, Any]]:
        if folder in self.listed:
            return self.listed[folder]
        below = [name.removeprefix(f"{folder}/" if folder else "") for name in self.files if name.startswith(folder)]
        folders = sorted({name.partition("/")[0] for name in below if "/" in name})
        prefix = f"{folder}/" if folder else ""
        return [{"path": name, "is_dir": True} for name in folders] + [
            {"path": name, "is_dir": False, "file_size": len(self.files[prefix + name])}
            for name in below
            if "/" not in name
        ]


def found(**content: Any) -> Reply:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _missing() -> Reply:
    return 404, {}, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"}).encode()


@contextmanager
def serving() -> Iterator[Registry]:
    """Serve a registry until the block ends."""
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            registry.requests.append((parts.path, dict(self.headers)))
            params = {name: values[0] for name, values in parse_qs(parts.query).items()}
            status, headers, content = registry.reply(parts.path, params)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | dict(headers)).items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        registry.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
