"""`python -m app models` against a service on a loopback socket."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.engine.base import LoadProgress
from tests.web.access import ADMIN_KEY, running
from tests.web.harness import ScriptedService, Web

Run = Callable[..., Awaitable[str]]


@pytest.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[object]) -> AsyncIterator[Run]:
    """Run commands against a service with the echo engine, which may load what is below `roots` and prints no log."""
    (tmp_path / "roots" / "third").mkdir(parents=True)
    monkeypatch.setenv("APP__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LLM_SERVICE_API_KEY", ADMIN_KEY)
    async with (
        running(tmp_path / "data", model={"roots": [str(tmp_path / "roots")]}) as app,
        Web(app.app, ScriptedService()).listening() as port,
    ):

        async def run(*arguments: str, code: int = 0, group: str = "models") -> str:
            at = ["--url", f"http://127.0.0.1:{port}"]
            ended = await asyncio.to_thread(CliRunner().invoke, cli, [group, *arguments, *at])
            assert code == ended.exit_code, ended.output
            return ended.output

        yield run


async def test_models_are_loaded_listed_and_unloaded(run: Run):
    """For people and for programs."""
    before = json.loads(await run("list", "--json"))
    loaded = await run("load", "third", "--source", "local", "--served-name", "third", "--engine", "echo")
    table = await run("list")
    unloaded = await run("unload", "third", "--grace-seconds", "1")
    others = ("--source", "local", "--served-name", "other", "--engine", "echo")
    again = json.loads(await run("load", "third", *others, "--json"))

    assert [("echo", "ready")] == [(model["name"], model["state"]) for model in before]
    assert "third is loaded" in loaded
    assert "third" in table
    assert "third is unloaded" in unloaded
    assert ("other", "ready") == (again["name"], again["state"])


@pytest.mark.parametrize("name", ["/etc", "../secret", "third/../../secret", "file:///etc", "https://example.com/a"])
async def test_what_leads_elsewhere_is_not_loaded(run: Run, name: str):
    assert "model_name" in await run("load", name, "--source", "local", code=1)


async def test_what_the_service_refuses_ends_the_command_with_its_words(run: Run):
    assert "model.roots" in await run("load", "/etc", "--source", "local", code=1)
    assert "not loaded" in await run("unload", "stranger", code=1)


async def test_a_wrong_key_and_a_service_that_is_not_there_are_told_apart(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_SERVICE_API_KEY", "not-the-key")

    assert "key" in await run("list", code=1)
    gone = await asyncio.to_thread(CliRunner().invoke, cli, ["models", "list", "--url", "http://127.0.0.1:9"])
    assert (1, True) == (gone.exit_code, "no service answers at http://127.0.0.1:9" in gone.output)


async def test_the_key_is_the_one_that_the_first_start_made(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "api_key").write_text(f"{ADMIN_KEY}\n")
    monkeypatch.delenv("LLM_SERVICE_API_KEY")

    assert "echo" in await run("list")


async def test_a_token_comes_from_the_environment_and_from_nowhere_else(run: Run, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    assert "needs HF_TOKEN in the environment" in await run("load", "third", "--source", "local", "--hub-token", code=2)
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert "hf_canary" not in await run(
        "load", "third", "--source", "local", "--engine", "echo", "--served-name", "third", "--hub-token", "--json"
    )


async def test_adapters_are_listed_and_refusals_end_the_command(run: Run):
    """They are loaded and unloaded by the same commands, of models that take some."""
    assert [] == json.loads(await run("list", "--json", group="adapters"))
    assert "takes no adapters" in await run("load", "mine", "a", "--model", "echo", group="adapters", code=1)
    assert "not loaded" in await run("unload", "mine", group="adapters", code=1)


class _SlowLoad(BaseHTTPRequestHandler):
    """Answers as a service whose model has weights to read and layers to compile."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for progress in (LoadProgress("weights", 250_000_000, 500_000_000), LoadProgress("layers")):
            self.wfile.write(f"event: progress\ndata: {json.dumps(asdict(progress))}\n\n".encode())
            time.sleep(0.3)  # the bar is drawn ten times a second
        done = {"name": "mine", "device": "cpu", "dtype": "bfloat16"}
        self.wfile.write(f"event: done\ndata: {json.dumps(done)}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        pass


def test_a_terminal_shows_what_a_load_is_doing_and_the_bytes_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stage without bytes shows none, and not those of the stage before."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "150"), ("LLM_SERVICE_API_KEY", "k")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    with HTTPServer(("127.0.0.1", 0), _SlowLoad) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        at = ["--url", f"http://127.0.0.1:{server.server_address[1]}"]
        ended = CliRunner().invoke(cli, ["models", "load", "mine", *at])

    weights, _, layers = ended.output.partition("mine: compiling and measuring its layers")
    assert 0 == ended.exit_code
    assert "mine: reading its weights" in weights
    assert "250.0 MB of 500.0 MB" in weights
    assert "MB" not in layers
    assert "mine is loaded on cpu (bfloat16)." in layers
