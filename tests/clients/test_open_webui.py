"""Open WebUI with the documentation's settings, in Chromium: a typed question is answered."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.environments import OPEN_WEBUI, PLAYWRIGHT, command, installed
from tests.e2e.conftest import KEY, ROOT, Service, Start
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

DOCS = (ROOT / "docs/clients.md").read_text()
COMMAND = DOCS[: DOCS.index(" open-webui serve")].rpartition("```sh")[2]
SETTINGS = dict(each.split("=", 1) for each in shlex.split(COMMAND) if "=" in each)
"""Those of the documentation; the address and the key are the test's own."""
QUIET = {"OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1", "ANONYMIZED_TELEMETRY": "false", "WEBUI_SECRET_KEY": "a-test"}
"""Keeps it off the network."""


@pytest.fixture(scope="module")
def page(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    """Start a service with the limits of a newcomer and Open WebUI in front of it; give the address of its page."""
    # Greedy: at the usual temperature a model of this size now and then says something else.
    service = start(RATE_LIMIT__ENABLED="true", OPENAI__TEMPERATURE="0")
    folder = tmp_path_factory.mktemp("open-webui")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if "__" not in name},
        **SETTINGS,
        **QUIET,
        "DATA_DIR": str(folder),
        "OPENAI_API_BASE_URL": f"{service.url}/v1",
        "OPENAI_API_KEY": KEY,
    }
    program = installed(OPEN_WEBUI) / "bin" / "open-webui"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or _is_up(url), 300)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield url, service
    finally:
        process.kill()
        process.wait(10)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_question_typed_into_its_page_is_answered(page: tuple[str, Service]) -> None:
    """The page sends its tools with it; no request of the page is refused."""
    url, service = page
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium is not None, "needs Chromium"
    settings = {"OPEN_WEBUI_URL": url, "CHROMIUM": chromium, "OPENAI_BASE_URL": service.url, "OPENAI_API_KEY": KEY}

    ran = subprocess.run(
        command(PLAYWRIGHT),
        env={"PATH": os.environ["PATH"], "HOME": str(Path.home()), **settings},
        capture_output=True,
        text=True,
        timeout=600,
    )
    sys.stdout.write(ran.stdout)

    assert 0 == ran.returncode, f"{ran.stdout}\n{ran.stderr[-3000:]}"
    refused = [line for line in service.log.read_text().splitlines() if '"status_code": 4' in line]
    assert [] == refused
