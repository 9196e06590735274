"""Requests that schemathesis makes of the OpenAPI document, against a real service on a real socket.

Every answer is one that the document describes: its status, headers and body; wrong requests are refused, right ones
served, keys checked, and nothing ends in 500.  `hooks.py` says what is not a finding.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
KEY = "fuzz-tests-key-0123456789"
LONG_SEED = int(os.environ.get("FUZZ_SEED", "1"))

SETTINGS: dict[str, Any] = {
    "app": {"port": 0, "shutdown_grace_seconds": 1},
    "model": {"engine": "echo", "allowed": ["not/any"]},  # no worker is started for a name
    "security": {"api_key": KEY, "failed_keys_per_minute": 10_000_000},
    "rate_limit": {"enabled": False},
    "logging": {"level": "WARNING"},
}


@dataclass
class Target:
    """A running service."""

    url: str
    folder: Path

    def key(self, role: str) -> str:
        """Return a key of a role; the admin's is the configured one."""
        if role == "admin":
            return KEY
        created = httpx.post(f"{self.url}/v1/keys", json={"role": role}, headers={"X-API-Key": KEY})
        return str(created.json()["key"])

    def fuzz(self, role: str, *options: str, document: Path | None = None) -> dict[str, Any]:
        """Let schemathesis make requests, and return its report."""
        key, report = self.key(role), self.folder / f"{role}.json"
        where = [str(document), "--url", self.url] if document else [f"{self.url}/openapi.json"]
        done = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("schemathesis")), "run", *where, "--continue-on-failure"),
                # It ends the model that all others need.
                *("--exclude-path", "/unload_model"),
                # Both ways to send a key, so that it does not invent a second one.
                *("--header", f"X-API-Key: {key}", "--header", f"Authorization: Bearer {key}"),
                *("--report", "json", "--report-json-path", str(report), *options),
            ],
            cwd=self.folder,  # it leaves a folder of its own behind
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert report.exists(), done.stdout + done.stderr
        found: dict[str, Any] = json.loads(report.read_text())
        return found | {"output": done.stdout}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    settings = {**SETTINGS, "app": {**SETTINGS["app"], "data_dir": str(folder), "prompts_dir": str(ROOT / "prompts")}}
    config = folder / "config.yml"
    config.write_text(json.dumps(settings))
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "app", "serve", "--config", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " is ready: " in line)
        yield Target(line.partition(" is ready: ")[2].split()[0], folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert "Traceback" not in (folder / "log").read_text()


def assert_clean(report: dict[str, Any], at_least: int) -> None:
    assert [] == report["errors"], report["output"]
    assert [] == report["failures"], report["output"]
    assert (0, True) == (report["exit_code"], report["complete"]), report["output"]
    assert 0 == report["operations"]["errored"] == report["operations"]["skipped"]
    assert report["test_cases"]["generated"] >= at_least


@pytest.mark.parametrize("role", ["admin", "free"])
def test_hundreds_of_requests_get_the_answers_that_the_document_describes(target: Target, role: str):
    """Always the same ones."""
    assert_clean(target.fuzz(role, "--phases", "fuzzing,stateful", "--max-examples", "10", "--seed", "1"), 300)


def test_a_document_that_is_wrong_is_found_out(target: Target, tmp_path: Path):
    """Otherwise no finding above would mean nothing."""
    document = httpx.get(f"{target.url}/openapi.json").json()
    health = document["paths"]["/health"]["get"]
    document["paths"] = {"/health": {"get": health}}
    document["components"]["schemas"]["Health"]["properties"]["status"] = {"const": "ill"}
    (tmp_path / "wrong.json").write_text(json.dumps(document))

    report = target.fuzz("admin", "--phases", "coverage", document=tmp_path / "wrong.json")

    assert 1 == report["exit_code"]
    assert {"Response violates schema"} == {failure["title"] for failure in report["failures"]}


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ["admin", "free"])
def test_thousands_of_requests_get_the_answers_that_the_document_describes(target: Target, role: str):
    """Limits of every field, every wrong method and header, and chains of requests; FUZZ_SEED makes others."""
    assert_clean(target.fuzz(role, "--max-examples", "200", "--seed", str(LONG_SEED)), 5000)
