"""Personal data in prompts and answers, under every combination of filters: none of it is stored or logged."""

import logging
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.config import LoggingConfig
from app.engine.echo import EchoEngine
from app.events import Delta, Event
from app.requests import GenerationRequest
from app.telemetry import configure_logging
from tests.web.access import ADMIN_KEY, Running, running

CARD, SSN, MAIL = "4111 1111 1111 1111", "856-45-6789", "canary.jones@example.com"
PROMPT = f"My card is {CARD}, my SSN {SSN} and my address {MAIL}; the word is kumquat."
COMPLETION = (
    "Noted: card 5500 0000 0000 0004, SSN 123-45-6780, address other.canary@example.org; the word is mangosteen."
)
SECRETS = (CARD, SSN, MAIL, "5500 0000 0000 0004", "123-45-6780", "other.canary@example.org")
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat": {"messages": [{"role": "user", "content": PROMPT}], "session_id": "s"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/completions": {"prompt": PROMPT, "n": 2},
    "/v1/generate": {"prompt": PROMPT, "cache": True},
    "/v1/generate/batch": {"prompts": [PROMPT, PROMPT]},
}


class LeakyEngine(EchoEngine):
    """Answers every prompt with the same personal data, a few characters at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.prompts.append("".join(chr(each) for each in request.prompt_ids or () if each < 0x110000))
        ids = tuple(map(ord, COMPLETION))
        async with aclosing(super().stream(structs.replace(request, prompt_ids=ids))) as events:
            async for event in events:
                if not isinstance(event, Delta):
                    yield event
                    continue
                for start in range(0, len(event.text), 3):
                    text = event.text[start : start + 3]
                    yield Delta(text=text, tokens=len(text))


def found(text: str) -> list[str]:
    """Return which of the secrets a text holds, by their digits or their address."""
    return [secret for secret in SECRETS if secret in text]


async def drive(service: Running) -> dict[str, str]:
    """Send the prompt to every route, whole and as a stream, and return what was answered; the session goes on once."""
    replies = {}
    async with service.client() as http:
        for path, body in ROUTES.items():
            for stream in (False, True) if "batch" not in path else (False,):
                reply = await http.post(path, json=body | {"max_tokens": 500} | ({"stream": True} if stream else {}))
                replies[f"{path} {stream}"] = reply.text
                assert reply.status_code in (200, 400), reply.text
        replies["session"] = (await http.get("/v1/sessions/s")).text
    return replies


@pytest.mark.parametrize(
    ("enabled", "given", "generated"),
    [(True, given, generated) for given, generated in product(("mask", "block", "off"), ("mask", "off"))]
    + [(False, "mask", "mask"), (False, "off", "off")],
)
async def test_no_combination_of_filters_stores_or_logs_personal_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], enabled: bool, given: str, generated: str
):
    """Not in the inference log, the log at DEBUG, the cache in the database or a session; in sessions and that cache
    only where no personal data is looked for at all."""
    engine = LeakyEngine()
    stop = configure_logging(LoggingConfig(level="DEBUG", file=tmp_path / "log"))
    # As somebody might to find out what a library does.
    logging.getLogger("aiosqlite").setLevel(logging.DEBUG)
    try:
        async with running(
            tmp_path / "data",
            engine=engine,
            pii={"enabled": enabled, "input": given, "output": generated},
            logging={"store_text": True},
            cache={"persistent": True},
        ) as service:
            replies = await drive(service)
    finally:
        logging.getLogger("aiosqlite").setLevel(logging.NOTSET)
        stop()
    with sqlite3.connect(tmp_path / "data" / "service.db") as database:
        rows = database.execute("SELECT prompt, answer FROM inference_log").fetchall()
        cached = database.execute("SELECT answer FROM completion_cache").fetchall()
    database.close()
    log = (tmp_path / "log").read_text() + "".join(capfd.readouterr())
    blocked = enabled and given == "block"
    filtered_in, filtered_out = enabled and given != "off", enabled and generated != "off"

    assert [] == found(str(rows))
    assert blocked or ("[CARD]" in str(rows) and "[SSN]" in str(rows) and "[EMAIL]" in str(rows))
    assert blocked or 8 < sum("kumquat" in str(row) and "mangosteen" in str(row) for row in rows)
    assert "INFO" in log
    assert [] == found(log)
    assert "kumquat" not in log + replies["session"] * blocked
    assert "mangosteen" not in log
    if enabled:
        assert [] == found(replies["session"] + str(cached))
    assert blocked or "mangosteen" in replies["session"]
    # What the filters let through arrives, at the model and at the client: only what is kept is masked.
    assert blocked or filtered_in == (CARD not in "".join(engine.prompts))
    assert blocked or filtered_out == (SECRETS[3] not in replies["/v1/generate False"])


async def test_a_text_is_masked_before_its_end_is_cut_off(tmp_path: Path):
    """Half a card number is not recognised as one."""
    prompt = f"{'word ' * 3999}{CARD} and more"
    async with running(
        tmp_path,
        engine=EchoEngine(context_length=100_000),
        pii={"input": "off", "output": "off"},
        logging={"store_text": True},
        security={"max_prompt_chars": 50_000},
    ) as service:
        reply = await service.generate(ADMIN_KEY, prompt=prompt, max_tokens=50_000)
    with sqlite3.connect(tmp_path / "service.db") as database:
        ((prompt_row, answer_row),) = database.execute("SELECT prompt, answer FROM inference_log").fetchall()
    database.close()

    assert CARD in reply.text
    assert [20_000, 20_000] == [len(prompt_row), len(answer_row)]
    assert "4111" not in prompt_row + answer_row


async def test_what_is_kept_of_a_cut_response_shows_no_entity_that_has_begun(tmp_path: Path):
    """Not of any sample of an unfiltered response that `max_tokens` or a stop string cut inside a number."""
    greedy = {"temperature": 0}
    text = "My card is 5500 0000 0000 0004"
    async with (
        running(
            tmp_path,
            engine=EchoEngine(context_length=2000),
            pii={"input": "off", "output": "off"},
            logging={"store_text": True},
            cache={"persistent": True},
        ) as service,
        service.client() as http,
    ):
        for cut in ({"max_tokens": len(text) - 1}, {"stop": "0004", "max_tokens": 99}):
            reply = await http.post("/v1/completions", json=greedy | {"prompt": text, "n": 2} | cut)
            assert "5500 0000 0000" in reply.text
        body = greedy | {"prompt": "Route 66 or 4711 1111", "max_tokens": 99}
        whole = await http.post("/v1/completions", json=body)
        assert "4711 1111" in whole.text
    with sqlite3.connect(tmp_path / "service.db") as database:
        answers = [each for (each,) in database.execute("SELECT answer FROM inference_log ORDER BY created")]
        cached = database.execute("SELECT answer FROM completion_cache").fetchall()
    database.close()

    assert ["My card is \n\nMy card is "] * 2 + ["Route 66 or 4711 1111"] == answers
    assert "5500" not in str(cached)
    assert "4711" in str(cached)
