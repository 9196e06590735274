"""The examples of older services' documents, run as printed against a real service with the embedded model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.compat.examples import CALLS, JAVASCRIPT, LIFE_CYCLE, PYTHON, Example
from tests.e2e.conftest import KEY, ROOT, Service, Start
from tests.waiting import START_SECONDS

pytestmark = pytest.mark.e2e


def run(command: list[str], service: Service) -> str:
    """Run a program as the reader of a document does; return what it prints."""
    environment = {**os.environ, "URL": service.url, "KEY": KEY}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(example: Example, service: Service) -> None:
    """Run an example, and check what it is documented to return."""
    printed = run(["/bin/bash", "-c", example.command.replace("curl ", "curl -sS ", 1)], service)

    for text in example.texts:
        assert text in printed
    if example.fields:
        assert_documented(json.loads(printed), example.fields)


def assert_documented(value: Any, documented: Any) -> None:
    """Check that a value is what the document says: of a type, equal to a constant, or made of such values."""
    match documented:
        case type():
            assert isinstance(value, (int, float) if documented is float else documented), (value, documented)
        case Mapping():
            for name, each in documented.items():
                assert name in value
                assert_documented(value[name], each)
        case [each]:
            assert value
            for item in value:
                assert_documented(item, each)
        case _:
            assert documented == value


@pytest.mark.parametrize("example", CALLS, ids=lambda example: example.id)
def test_a_call_returns_what_its_document_says(example: Example, service: Service):
    call(example, service)


def test_a_model_is_loaded_used_and_unloaded_as_the_document_says(start: Start, tmp_path: Path):
    shutil.copytree(ROOT / "models" / "tiny-chat", tmp_path / "other-model", ignore=shutil.ignore_patterns("training"))
    service = start(MODEL__ROOTS=json.dumps([str(tmp_path)]), MODEL__ENGINE="batching")
    for example in LIFE_CYCLE:
        call(example, service)
    service.stop()


def test_the_client_in_python_prints_a_text(service: Service):
    pytest.importorskip("requests")

    assert run([sys.executable, "-c", PYTHON], service).startswith("Generated: ")


@pytest.mark.skipif(shutil.which("node") is None, reason="this machine has no Node")
def test_the_client_in_javascript_prints_a_text(service: Service):
    assert run([str(shutil.which("node")), "-e", JAVASCRIPT], service).strip() not in ("", "undefined")
