"""The command line."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app import __version__
from app.access.database import head_revision
from app.access.key_format import id_of
from app.cli import bench, cli, serve_only
from app.config import Settings


def test_a_configuration_file_that_was_asked_for_has_to_be_there():
    """A misspelt name would otherwise start the service with its defaults."""
    ended = CliRunner().invoke(cli, ["serve", "--config", "typo.yml"])

    assert 2 == ended.exit_code
    assert "llm-service: there is no file typo.yml" in ended.output


def test_the_version_is_printed():
    """The package's own."""
    for argument in ("version", "--version"):
        assert f"{__version__}\n" == CliRunner().invoke(cli, [argument]).output


def run(*arguments: str, code: int = 0) -> str:
    """Run a command in the current folder and return what it says."""
    ended = CliRunner().invoke(cli, list(arguments))
    assert code == ended.exit_code, ended.output
    return ended.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a configuration, and no variable that names a database."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL", "DATABASE__URL", "APP__DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_keys_are_created_listed_rotated_and_revoked(folder: Path):
    """The secret is printed once; tables for people and JSON for programs say the same."""
    assert f"revision {head_revision()}" in run("db", "upgrade")
    created = json.loads(run("keys", "create", "--owner", "anna", "--days", "1", "--monthly-tokens", "9", "--json"))
    shown = run("keys", "create", "--role", "admin")
    rotated = json.loads(run("keys", "rotate", created["id"], "--overlap-hours", "2", "--json"))
    revoked = run("keys", "revoke", created["id"])
    rows = json.loads(run("keys", "list", "--json"))
    table = run("keys", "list")

    assert created["id"] == id_of(created["key"]) == id_of(rotated["key"])
    assert id_of(shown.split()[0]) is not None
    assert "revoked" in revoked
    assert [("revoked", "anna", "standard"), ("active", None, "admin")] == [
        (row["state"], row["owner"], row["role"]) for row in rows
    ]
    assert {"monthly_tokens": 9} == rows[0]["own_limits"]
    assert created["id"] in table
    assert created["key"][14:] not in table + str(rows)


def test_roles_are_listed_and_changed(folder: Path):
    """What is not named stays; a role of a new name is made."""
    run("db", "upgrade")
    run("roles", "set", "team", "--requests-per-minute", "60", "--models", "a, b", "--no-raw-logprobs")
    run("roles", "set", "team", "--no-control-tokens")
    run("roles", "set", "team", "--burst", "5", "--models", "all")
    (team,) = [role for role in json.loads(run("roles", "list", "--json")) if role["name"] == "team"]

    names = "requests_per_minute burst models raw_logprobs control_tokens system_messages"
    assert [60, 5, "all", False, False, True] == [team[name] for name in names.split()]
    assert "default" in run("roles", "set", "team", "--burst", "many", code=2)
    assert "may manage" not in run("roles", "set", "admin", "--no-manage-keys", code=1)


def test_a_role_that_may_use_no_model_is_not_shown_as_one_that_may_use_all(folder: Path):
    run("db", "upgrade")
    for none in ("none", ""):
        (role,) = json.loads(run("roles", "set", "locked", "--models", none, "--json"))
        assert "none" == role["models"]
        (role,) = json.loads(run("roles", "set", "locked", "--models", "all", "--json"))
        assert "all" == role["models"]


def test_usage_says_when_there_is_none(folder: Path):
    run("db", "upgrade")

    assert "Tokens used in 2026-01: none\n" == run("usage", "--month", "2026-01")
    assert [] == json.loads(run("usage", "--json"))
    for month in ("2026-99", "9999-12", "0001-01", "x"):
        assert "2026-11" in run("usage", "--month", month, code=1)


def test_no_date_is_too_far_away_for_the_calendar(folder: Path):
    run("db", "upgrade")

    for days in ("36601", "3000000", "1e308", "nan"):
        assert "--days" in run("keys", "create", "--days", days, code=2)
    assert "llm_" in run("keys", "create", "--days", "36600")


def test_the_database_says_how_it_is(folder: Path):
    """Before there is one, after, and when it is damaged."""
    assert "revision none" in run("db", "current")
    assert "db upgrade" in run("keys", "list", code=2)
    run("db", "upgrade")
    newest = {"revision": head_revision(), "newest": head_revision()}
    assert newest.items() <= json.loads(run("db", "check", "--json")).items()

    with sqlite3.connect(folder / "data" / "service.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    assert "newer than this program" in run("keys", "list", code=2)

    (folder / "data" / "service.db").write_bytes(b"not a database" * 100)
    assert "data/service.db" in run("db", "check", code=1)


def test_a_copy_of_the_database_is_whole_and_takes_its_place(folder: Path):
    """Also while somebody writes; never in place of another file, and only for its owner."""
    run("db", "upgrade")
    assert "llm_" in run("keys", "create", "--owner", "anna")
    database = folder / "data/service.db"
    with sqlite3.connect(database, isolation_level=None) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM api_keys")
        assert "MB" in run("db", "backup", "copy.db")
        writer.execute("COMMIT")
    writer.close()
    assert "anna" not in run("keys", "list")

    assert "copy.db cannot be written: File exists" in run("db", "backup", "copy.db", code=1)
    assert 0o600 == (folder / "copy.db").stat().st_mode & 0o777
    for file in database.parent.glob("service.db*"):
        file.unlink()
    (folder / "copy.db").rename(database)
    assert "anna" in run("keys", "list")


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("mysql://x", 2, "must begin with postgresql:// or sqlite:///"),
        ("sqlite://", 2, "name a file"),
        ("postgresql://u:canary@127.0.0.1:1/x", 1, "does not answer"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str, code: int, message: str
):
    monkeypatch.setenv("DATABASE_URL", url)

    said = run("keys", "list", code=code)

    assert message in said
    assert "canary" not in said


def test_an_unknown_key_or_role_is_an_error_of_one_line(folder: Path):
    run("db", "upgrade")

    assert "llm-service: There is no key of this id.\n" == run("keys", "revoke", "nobody", code=1)
    assert "llm-service: There is no role of this name.\n" == run("keys", "create", "--role", "x", code=1)


def test_the_level_of_the_log_can_be_named_at_the_start(monkeypatch: pytest.MonkeyPatch):
    """By the script `serve` too, which is the command of that name."""
    started: list[Settings] = []

    def run(settings: Settings) -> int:
        started.append(settings)
        return 0

    monkeypatch.setattr("app.server.run", run)
    monkeypatch.setattr("sys.argv", ["serve", "--log-level", "debug", "--port", "9000"])

    with pytest.raises(SystemExit) as ended:
        serve_only()

    assert 0 == ended.value.code
    assert ("DEBUG", 9000) == (started[0].logging.level, started[0].app.port)


def test_a_mistake_in_the_configuration_does_not_wait_for_the_imports_of_the_service():
    """They take seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "app", "serve"]
    done = subprocess.run(command, env={**os.environ, "MODEL__NMAE": "x"}, capture_output=True, text=True, check=False)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "model.nmae: there is no such key" in done.stderr
    assert (True, False) == ("app.config" in imported, "app.server" in imported)


def test_an_interrupt_while_the_service_is_imported_is_quiet():
    """No traceback: the process ends as any other program does."""
    command = [sys.executable, "-X", "importtime", "-m", "app", "serve"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("pydantic" in line for line in process.stderr), "the imports were over before they began"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()

    assert "Traceback" not in rest
    assert process.returncode in (-signal.SIGINT, 130)


def test_one_measures_ones_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The embedded one here, for programs; what a terminal shows meanwhile does not mix with the figures."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "150")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bench, "SHAPES", ((1, 8), (2, 16), (1, 100_000)))
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(bench, "MAX_ROUNDS", 2)

    ended = CliRunner().invoke(cli, ["bench", "--json"])

    rows = json.loads(ended.stdout)
    assert [(1, 8, 2), (2, 16, 2)] == [(row["requests"], row["prompt_tokens"], row["rounds"]) for row in rows]
    assert all(row[key] > 0 for row in rows for key in ("tokens_per_second", "first_token_ms"))
    assert "measuring 1 request, 8 tokens each" in ended.stderr
    assert "measuring 2 requests at once, 16 tokens each" in ended.stderr


def test_a_model_that_cannot_be_measured_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()

    assert "empty has no config.json" in run("bench", "empty", code=1)
    monkeypatch.setenv("MODEL__ENGINE", "echo")
    assert "the engine is echo" in run("bench", code=2)
