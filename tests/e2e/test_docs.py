"""The code blocks of README and docs: they run as the reader runs them, and print what stands below."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from app.config import load_settings
from tests.code_blocks import PAGES, RUN, CodeBlock, blocks, matches
from tests.e2e.conftest import ROOT, Service, Start, environment, ready, take_over
from tests.waiting import START_SECONDS, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ADDRESS = "http://127.0.0.1:8000"
"""What pages call the service."""
PIP = """\
#!{python}
import sys
from importlib.metadata import version
print(*(f"{{name}} {{version(name)}}" for name in sys.argv[2:] if not name.startswith("-")), file=sys.stderr)
"""
"""The reader's pip: packages are installed already, so it only fails for one that is not."""


def to_run(page: str) -> list[CodeBlock]:
    return [block for block in blocks(page) if block.language in RUN and not block.not_run]


class Reader:
    """Types the blocks of a page one after the other: in the service's folder, with what earlier ones have set.

    Each reader has a key of their own in data/api_key, as after a first start: limits, sessions and cache are new.
    """

    def __init__(self, service: Service, bootstrap_key: str, folder: Path) -> None:
        self.service, self.folder, self.state = service, service.log.parent, folder / "state"
        own = {"APP__PORT": service.url.rpartition(":")[2], "BASH_ENV": str(self.state), "TMPDIR": str(folder)}
        self.environment = {**environment(self.folder / "data"), **own}
        self.state.touch()
        created = service.client.post("/v1/keys", headers={"X-API-Key": bootstrap_key}, json={"role": "admin"})
        (self.folder / "data" / "api_key").write_text(f"{created.json()['key']}\n")

    def run(self, block: CodeBlock) -> str | None:
        """Run a block; returns what is wrong with it, if anything is."""
        code = block.code.replace(ADDRESS, self.service.url)
        if block.language == "yaml":
            (self.state.parent / "config.yml").write_text(code)
            load_settings(self.state.parent / "config.yml", None)
            return None
        done = self._python(code) if block.language == "python" else self._shell(code)
        expected = block.output.replace(ADDRESS, self.service.url) if block.output is not None else None
        if done.returncode or (done.stderr and block.language == "python"):
            return f"{block}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        if expected is not None:
            return None if matches(expected, done.stdout) else f"{block}: expected\n{expected}\nprinted\n{done.stdout}"
        return f"{block}: is refused\n{done.stdout}" if '"error":' in done.stdout else None

    def _shell(self, code: str) -> subprocess.CompletedProcess[str]:
        """What the block sets is there for the next one, as in the reader's terminal."""
        stored = f"{{ declare -p | grep -E '^declare -[-x]+ [A-Z]' | grep -v ' BASH'; declare -f; }} > {self.state}.new"
        script = f"set -o pipefail\n{code}\nended=$?\n{stored}\nmv {self.state}.new {self.state}\nexit $ended"
        return self._run(["bash", "-c", script])

    def _python(self, code: str) -> subprocess.CompletedProcess[str]:
        return self._run(["bash", "-c", 'exec "$0" "$@"', sys.executable, "-c", code])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=250, check=False
        )


@pytest.fixture(scope="module")
def documented(start: Start) -> tuple[Service, str]:
    """The service that pages talk to, as it comes but for chance in its answers; and its first key."""
    service = start(
        wait=False, SECURITY__API_KEY="", RATE_LIMIT__ENABLED="true", MODEL__TEMPERATURE="0", MODEL__COMPILE="none"
    )
    wait_for(lambda: ready(service), START_SECONDS)
    folder = service.log.parent
    for name in ("models", "prompts"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in {
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "pip": PIP.format(python=sys.executable),
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return service, (folder / "data" / "api_key").read_text().strip()


@pytest.fixture
def reader(documented: tuple[Service, str], compiled: Path) -> Iterator[Reader]:
    with TemporaryDirectory(prefix="docs-") as folder:  # a short name: sockets of workers stand in it
        # Where a program that loads a model looks for compiled kernels.
        own = Path(folder) / f"llm-service-{os.geteuid()}"
        own.mkdir(mode=0o700)
        take_over(compiled, own)
        yield Reader(*documented, Path(folder))
        take_over(own, compiled)


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)])
def test_the_blocks_of_a_page_run_and_print_what_stands_below_them(page: str, reader: Reader):
    """One after the other, with the limits of a first start: nobody who follows a page runs into 429."""
    assert [] == [wrong for block in to_run(page) if (wrong := reader.run(block))]


def installed(page: str) -> set[str]:
    """Return the packages that `make run` installs, and those that the page tells its reader to."""
    named = re.findall(r"pip install ((?:[\w-]+ ?)+)", (ROOT / page).read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {re.split(r"[<>=\[; ]", each)[0] for each in [*project, *" ".join(named).split()]} | {"app"}


@pytest.mark.parametrize("page", [page for page in PAGES if any(each.language == "python" for each in to_run(page))])
def test_what_a_block_imports_is_what_its_reader_has_installed(page: str):
    imported = set()
    for block in to_run(page):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
                elif isinstance(node, ast.Import):
                    imported |= {each.name.split(".")[0] for each in node.names}

    assert imported
    assert set() == {name.replace("_", "-") for name in imported - sys.stdlib_module_names} - installed(page)
