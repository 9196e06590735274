"""Real clients, each in an environment of its own: a chat, a stream, a tool round trip, a structured answer.

Runs with `make test-clients`, which installs the clients and so needs the package indexes.
"""

import os
import subprocess
import sys

import pytest

from tests.clients.environments import CLIENTS, Client, command
from tests.e2e.conftest import KEY, Service

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.program)
def test_a_client_talks_calls_tools_and_gets_structured_answers(client: Client, service: Service) -> None:
    """With nothing but the base URL and a key."""
    settings = {
        "OPENAI_BASE_URL": f"{service.url}/v1",
        "OPENAI_API_KEY": KEY,
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "NO_PROXY": "127.0.0.1",
    }
    ran = subprocess.run(command(client), env=settings, capture_output=True, text=True, timeout=300)
    sys.stdout.write(ran.stdout)

    assert 0 == ran.returncode, f"{ran.stdout}\n{ran.stderr[-3000:]}"
