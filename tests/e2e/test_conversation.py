"""What a person at the other end gets from the embedded model."""

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Service, Start

pytestmark = pytest.mark.e2e


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read server-sent events as they come."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def stream(service: Service, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the joined text of a stream and its last event."""
    with service.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        got = list(events(response))
    assert {"delta"} >= {name for name, _ in got[:-1]}
    assert "done" == got[-1][0]
    return "".join(data["content"] for _, data in got[:-1]), got[-1][1]


def test_a_session_remembers_what_was_said_and_no_other_session_does(service: Service) -> None:
    """My name is Tovin: the session knows it in its next turn, another session and no session do not."""
    session = f"s-{uuid.uuid4().hex}"
    service.chat("My name is Tovin.", session_id=session)
    service.chat("Thank you!", session_id=session)

    assert "Tovin" in service.chat("What is my name?", session_id=session)["message"]["content"]
    assert "Tovin" not in service.chat("What is my name?", session_id=session + "x")["message"]["content"]
    assert "Tovin" not in service.chat("What is my name?")["message"]["content"]

    shown = service.get(f"/v1/sessions/{session}").json()
    assert "My name is Tovin." == shown["messages"][0]["content"]
    assert 200 <= service.client.delete(f"/v1/sessions/{session}").status_code < 300
    assert 404 == service.get(f"/v1/sessions/{session}").status_code


def test_the_model_knows_what_its_card_says(service: Service) -> None:
    """A capital by chat, and the same as the continuation of a plain text."""
    assert "Paris" in service.chat("What is the capital of France?")["message"]["content"]

    body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    reply = service.client.post("/v1/generate", json=body).json()

    assert "Paris" in reply["generated_text"]
    assert "The capital of France is" == reply["prompt"]
    assert reply["usage"]["completion_tokens"] == reply["tokens_generated"] <= 4


def test_a_stream_says_the_same_as_a_whole_answer_token_by_token(service: Service) -> None:
    """Greedy text, tokens and finish reason agree; the stream comes in many pieces."""
    body = {"messages": [{"role": "user", "content": "Tell me a story"}], "temperature": 0, "cache": False}
    whole = service.client.post("/v1/chat", json=body).json()

    with service.client.stream("POST", "/v1/chat", json={**body, "stream": True}) as response:
        got = list(events(response))

    assert whole["message"]["content"] == "".join(data["content"] for name, data in got if name == "delta")
    # On a busy machine many tokens may come at once, but never the first with all others.
    assert len(got) > 2
    done = got[-1][1]
    # The second need not compute the prompt again.
    for usage in (whole["usage"], done["usage"]):
        del usage["prompt_tokens_details"]
    for key in ("finish_reason", "usage", "tokens_generated", "model"):
        assert whole[key] == done[key]


def test_the_same_request_twice_is_answered_from_the_cache_whole_and_streamed(service: Service) -> None:
    """`cached` tells; the text is the same; "cache": false asks the model again."""
    body = {"prompt": f"Once upon a time {uuid.uuid4().hex[:6]}", "max_tokens": 20}

    first = service.client.post("/v1/generate", json=body).json()
    second = service.client.post("/v1/generate", json=body).json()
    text, done = stream(service, "/v1/generate", body)
    fresh = service.client.post("/v1/generate", json={**body, "cache": False}).json()

    assert (False, True, True, False) == (first["cached"], second["cached"], done["cached"], fresh["cached"])
    assert first["generated_text"] == second["generated_text"] == text


def test_a_stop_string_ends_the_answer_before_it(service: Service) -> None:
    """The stop text, which spans tokens, is in neither the whole answer nor the stream."""
    body = {"messages": [{"role": "user", "content": "Count from 1 to 20"}], "temperature": 0, "cache": False}
    assert "9" in service.client.post("/v1/chat", json=body).json()["message"]["content"]

    whole = service.client.post("/v1/chat", json={**body, "stop": ["7, 8"]}).json()
    text, done = stream(service, "/v1/chat", {**body, "stop": ["7, 8"]})

    assert "stop" == whole["finish_reason"] == done["finish_reason"]
    assert whole["message"]["content"] == text
    assert text.rstrip().endswith("6,")


def test_the_same_seed_gives_the_same_answer(service: Service) -> None:
    """Sampling at a high temperature, twice with one seed and once with another."""
    body = {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 1.5, "cache": False}

    def text(seed: int) -> str:
        answer: str = service.client.post("/v1/generate", json={**body, "seed": seed}).json()["generated_text"]
        return answer

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_personal_data_never_comes_back_and_is_kept_nowhere(service: Service) -> None:
    """An e-mail address in a chat is in no answer, stream, session, metric or log."""
    canary, session = "jane.doe@example.com", f"s-{uuid.uuid4().hex}"
    first = service.chat(f"My email address is {canary}.", session_id=session)
    second = service.chat("What is my email address?", session_id=session)
    body = {"messages": [{"role": "user", "content": f"Repeat after me: {canary}"}], "temperature": 0}
    text, _ = stream(service, "/v1/chat", body)
    generated = service.client.post("/v1/generate", json={"prompt": f"Mail {canary} or", "max_tokens": 5}).json()

    everything = json.dumps([first, second, text, generated, service.get(f"/v1/sessions/{session}").json()])
    everything += service.get("/metrics").text + service.get("/status").text + service.log.read_text()
    assert "jane.doe" not in everything
    assert "[EMAIL]" in service.get(f"/v1/sessions/{session}").text
    assert 'pii_matches_total{direction="input",kind="email"}' in service.get("/metrics").text


def test_a_prompt_beyond_the_context_window_names_both_numbers(service: Service) -> None:
    """2,048 tokens are the embedded model's window."""
    reply = service.client.post("/v1/generate", json={"prompt": "x", "max_tokens": 5000})

    assert (400, "context_length_exceeded") == (reply.status_code, reply.json()["error"])
    assert 2048 == reply.json()["details"]["limit"]
    assert 5000 == reply.json()["details"]["max_tokens"]


def test_what_the_model_itself_says_is_filtered(start: Start) -> None:
    """With the input filter off the real model repeats an address; the client sees a placeholder."""
    service = start(PII__INPUT="off")
    body = {"messages": [{"role": "user", "content": "Repeat after me: jane.doe@example.com"}], "temperature": 0}

    whole = service.client.post("/v1/chat", json=body).json()["message"]["content"]
    text, _ = stream(service, "/v1/chat", {**body, "cache": False})

    assert "[EMAIL]" == whole == text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health", None),
        ("/status", None),
        ("/metrics", None),
        (
            "/v1/generate",
            {"prompt": "Explain quantum computing in simple terms", "max_tokens": 200, "temperature": 0.7},
        ),
        (
            "/v1/chat",
            {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 100,
                "temperature": 0.7,
            },
        ),
        (
            "/v1/chat",
            {
                "session_id": "user-123-conversation",
                "messages": [{"role": "user", "content": "What is Python?"}],
                "max_tokens": 100,
            },
        ),
        ("/v1/chat", {"messages": [{"role": "user", "content": "Tell me a story"}], "stream": True}),
    ],
)
def test_the_usual_examples_of_such_a_service_work_as_they_are(
    service: Service, path: str, body: dict[str, Any] | None
) -> None:
    """Bodies as they stand in other services' manuals."""
    reply = service.get(path) if body is None else service.client.post(path, json=body)

    assert 200 == reply.status_code
    assert reply.text
