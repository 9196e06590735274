"""`python -m app sessions` against a service on a loopback socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from app.cli import cli
from tests.web.access import ADMIN_KEY, running
from tests.web.harness import ScriptedService, Web

Run = Callable[..., Awaitable[str]]


@pytest.fixture
async def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[object]) -> AsyncIterator[Run]:
    """Run commands against a service with one conversation."""
    monkeypatch.setenv("APP__DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LLM_SERVICE_API_KEY", ADMIN_KEY)
    async with (
        running(tmp_path / "data") as app,
        Web(app.app, ScriptedService()).listening() as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": ADMIN_KEY}) as client,
    ):
        said = {"role": "user", "content": "Hello [bold]\x1b[31m there"}
        answered = await client.post("/v1/chat", json={"session_id": "notes", "messages": [said]})
        assert 200 == answered.status_code, answered.text

        async def run(*arguments: str, code: int = 0) -> str:
            at = ["--url", f"http://127.0.0.1:{port}"]
            ended = await asyncio.to_thread(CliRunner().invoke, cli, ["sessions", *arguments, *at])
            assert code == ended.exit_code, ended.output
            return ended.output

        yield run


async def test_sessions_are_listed_shown_renamed_and_forgotten(run: Run):
    before = json.loads(await run("list", "--json"))
    shown = await run("show", "notes")
    await run("rename", "notes", "Otters")
    renamed = await run("list")
    messages = json.loads(await run("show", "notes", "--json"))["messages"]
    await run("delete", "notes")

    assert ["notes"] == [session["session_id"] for session in before]
    assert "user: Hello [bold]?[31m there" in shown
    assert "Otters" in renamed
    assert ["user", "assistant"] == [message["role"] for message in messages]
    assert "none" in await run("list")


@pytest.mark.parametrize("session_id", ["nobody", "../models", "a/b c"])
async def test_a_session_that_is_not_there_ends_the_command(run: Run, session_id: str):
    await run("show", session_id, code=1)
    await run("delete", session_id, code=1)


async def test_a_title_is_listed_as_it_was_written_whatever_brackets_it_holds(run: Run):
    """Tables of rich read markup in brackets, and end the program at one that closes nothing."""
    await run("rename", "notes", "[/list] of [red]\x1b[31m otters")

    assert "[/list] of [red]?[31m otters" in await run("list")
