"""The Python blocks of README and docs: they run as the reader runs them, and print what stands below."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.conftest import KEY, ROOT, Service
from tests.waiting import START_SECONDS

pytestmark = pytest.mark.e2e

PAGES = ("README.md", "docs/langchain.md", "docs/batches.md")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs() -> list[tuple[str, str, str]]:
    """Return the page, the code and the output of each Python block."""
    found = []
    for page in PAGES:
        blocks = _BLOCK.findall((ROOT / page).read_text())
        for (language, code), (_, output) in pairwise(blocks):
            if language == "python":
                found.append((page, code, output))
    return found


def installed(page: str) -> set[str]:
    """Return the packages that `make run` installs, and those that the page tells its reader to."""
    named = re.findall(r"pip install ((?:[\w-]+ ?)+)", (ROOT / page).read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {re.split(r"[<>=\[; ]", each)[0] for each in [*project, *" ".join(named).split()]} | {"app"}


@pytest.mark.parametrize("page", [*PAGES, "docs/openai.md"])
def test_what_a_block_imports_is_what_its_reader_has_installed(page: str):
    imported = set()
    for language, code in _BLOCK.findall((ROOT / page).read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
                elif isinstance(node, ast.Import):
                    imported |= {each.name.split(".")[0] for each in node.names}

    assert imported
    assert set() == {name.replace("_", "-") for name in imported - sys.stdlib_module_names} - installed(page)


@pytest.mark.parametrize(("page", "code", "output"), programs())
def test_a_block_prints_what_stands_below_it(page: str, code: str, output: str, service: Service, tmp_path: Path):
    """In a folder that looks like the reader's: the model beside it, the key where the first start put it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "api_key").write_text(f"{KEY}\n")
    (tmp_path / "models").symlink_to(ROOT / "models")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OPENAI_BASE_URL": f"{service.url}/v1",
        "OPENAI_API_KEY": KEY,
    }

    done = subprocess.run(
        [sys.executable, "-c", code.replace("http://127.0.0.1:8000", service.url)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    assert (output, "") == (done.stdout, done.stderr)
