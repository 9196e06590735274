"""Real clients, each in an environment of its own: a chat, a stream, a tool round trip, a structured answer.

Runs with `make test-clients`, which installs the clients and so needs the package indexes.
"""

import os
import subprocess
import sys

import pytest

from tests.clients.environments import AXIOS, CLIENTS, LM_EVAL, Client, command
from tests.e2e.conftest import KEY, ROOT, Service, Start

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


def test_the_client_in_javascript_that_an_older_service_printed_prints_a_text(service: Service) -> None:
    """With axios, as it was printed."""
    settings = {"PATH": os.environ["PATH"], "URL": service.url, "KEY": KEY}

    ran = subprocess.run(command(AXIOS), env=settings, capture_output=True, text=True, timeout=60)

    assert (0, "") == (ran.returncode, ran.stderr)
    assert ran.stdout.strip() not in ("", "undefined")


def test_lm_eval_finds_the_right_choices(start: Start) -> None:
    """By log-likelihoods of choices, and of a text of several windows."""
    service = start(PII__ENABLED="false", MODEL__DTYPE="float32")
    arguments = ["--url", service.url, "--tokenizer", str(ROOT / "models" / "tiny-chat")]
    settings = {"OPENAI_API_KEY": KEY, "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}

    ran = subprocess.run([*command(LM_EVAL), *arguments], env=settings, capture_output=True, text=True, timeout=600)
    sys.stdout.write(ran.stdout)

    assert 0 == ran.returncode, f"{ran.stdout}\n{ran.stderr[-3000:]}"
