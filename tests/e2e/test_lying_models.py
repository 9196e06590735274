"""Models with a fault, in the whole service: what the operator reads, and what other clients notice."""

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Service, Start, environment, serve
from tests.unit.lying_models import Damage, change_json, drop_weights, lying_llama, save_overflowing_gpt2, write
from tests.unit.tiny_models import CHATML, chatml_tokenizer
from tests.waiting import START_SECONDS, wait_for

pytestmark = pytest.mark.e2e

FOREVER = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
REFUSED: dict[str, tuple[Damage, str]] = {
    "weights": (drop_weights("lm_head"), "The model cannot be loaded: the weights lack lm_head.weight."),
    "field": (
        change_json("generation_config.json", {"temperature": "hot"}),
        "The model cannot be loaded: generation_config.json: temperature must be a number.",
    ),
    "template": (
        write("chat_template.jinja", FOREVER),
        "The model's tokenizer cannot be loaded: chat_template: it takes too much time for a few words.",
    ),
}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        # A template's time takes twelve seconds to run out.
        pytest.param(*case, id=name, marks=pytest.mark.soak if name == "template" else ())
        for name, case in REFUSED.items()
    ],
)
def test_a_faulty_model_ends_the_start_with_its_reason(tmp_path: Path, damage: Damage, reason: str):
    """In one line, with an exit code that is not 0 and without a traceback."""
    folder = lying_llama(tmp_path / "model", damage)
    ended = subprocess.run(
        serve(0),
        cwd=tmp_path,
        env=environment(tmp_path / "data", MODEL__NAME=str(folder)),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )

    assert f"llm-service: {reason}" in ended.stderr.splitlines()
    assert 1 == ended.returncode
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def bomb(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A service whose chat template loops on one word, and whose scores are not finite after another."""
    folder = save_overflowing_gpt2(tmp_path_factory.mktemp("bomb"), "~")
    template = "{% if 'bomb' in messages[-1].content %}" + FOREVER + "{% endif %}" + CHATML
    chatml_tokenizer(template).save_pretrained(folder)
    change_json("generation_config.json", {"temperature": 9.5})(folder)
    service = start(MODEL__NAME=str(folder), CACHE__ENABLED="false", wait=False)

    def answers() -> bool:
        assert service.process.poll() is None, service.log.read_text()
        try:
            return service.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(answers, START_SECONDS)
    return service


ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/v1/chat", {"stream": False}),
    "native stream": ("/v1/chat", {"stream": True}),
    "openai": ("/v1/chat/completions", {"stream": False}),
    "openai stream": ("/v1/chat/completions", {"stream": True}),
}


def send(service: Service, path: str, text: str, fields: dict[str, Any]) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}
    return httpx.post(f"{service.url}{path}", json=body, headers=service.client.headers, timeout=START_SECONDS)


@pytest.mark.parametrize(("path", "fields"), ROUTES.values(), ids=ROUTES)
def test_one_users_word_does_not_hold_the_others(bomb: Service, path: str, fields: dict[str, Any]):
    """While the template is being stopped, other chats are answered; the one gets 400, which nobody retries."""
    outcome: list[tuple[httpx.Response, float]] = []

    def send_bomb() -> None:
        outcome.append((send(bomb, path, "a bomb", fields), time.monotonic()))

    thread = threading.Thread(target=send_bomb)
    thread.start()
    time.sleep(0.3)
    for _ in range(5):
        assert bomb.chat("hello", max_tokens=1)["usage"]["completion_tokens"] == 1
    others_ended = time.monotonic()
    thread.join()

    ((reply, ended),) = outcome
    assert 400 == reply.status_code, reply.text
    assert "template takes more time or memory" in reply.text
    assert "bomb" not in reply.text
    assert others_ended < ended


@pytest.mark.parametrize(("path", "fields"), ROUTES.values(), ids=ROUTES)
def test_scores_that_are_not_finite_are_an_error_on_every_route(bomb: Service, path: str, fields: dict[str, Any]):
    """The same one, never an answer without text; a stream, whose headers have left, ends with it as its one event."""
    failed = send(bomb, path, "~", fields)

    assert (200 if fields["stream"] else 503) == failed.status_code, failed.text
    assert 1 == failed.text.count("scores are not finite") == failed.text.count("service_unavailable")
    assert '"finish_reason":"stop"' not in failed.text
    assert 200 == send(bomb, path, "hello", fields).status_code


def test_what_a_load_warned_of_stands_in_the_services_log(bomb: Service):
    """In a line of its own, as whatever the service itself logs."""
    bomb.logged("generation_config.json: temperature")
    lines = [line for line in bomb.log.read_text().splitlines() if "generation_config.json: temperature" in line]

    assert 1 == len(lines)
    assert lines[0].startswith("{")
