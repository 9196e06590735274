"""What holds on every generating route, native or OpenAI's, because all take the one path: one set of promises for all.

The real service over the echo engine, in the application as `create_app` builds it.
"""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.config import load_settings
from app.engine.echo import EchoEngine
from app.main import create_app
from tests.waiting import HANG_SECONDS, until
from tests.web.access import running
from tests.web.harness import MODEL, Web, is_envelope, make_web
from tests.web.test_connections import post

# What it runs again and again is measured by other tests.
pytestmark = pytest.mark.no_cover

KEY = "every-route-key"
CANARY = "jane.doe@example.com"


@dataclass(frozen=True)
class Route:
    """How to say one thing on a route."""

    path: str
    say: Callable[[str], dict[str, Any]]
    streams: bool = True

    def body(self, text: str = "hello", **fields: Any) -> dict[str, Any]:
        return {**self.say(text), "temperature": 0, **fields}


def _messages(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


ROUTES = [
    Route("/v1/generate", lambda text: {"prompt": text}),
    Route("/v1/generate/batch", lambda text: {"prompts": [text]}, streams=False),
    Route("/v1/chat", _messages),
    Route("/v1/chat/completions", _messages),
    Route("/v1/completions", lambda text: {"prompt": text}),
    Route("/v1/completions", lambda text: {"prompt": [text, text]}),
    Route("/v1/completions", lambda text: {"prompt": list(map(ord, text))}),
]
NAMES = "generate batch chat chat-completions completions completions-texts completions-tokens".split()
every_route = pytest.mark.parametrize("route", ROUTES, ids=NAMES)
every_stream = pytest.mark.parametrize(
    ("route", "stream"),
    [
        pytest.param(route, stream, id=f"{name}-{'stream' if stream else 'whole'}")
        for route, name in zip(ROUTES, NAMES, strict=True)
        for stream in ((False, True) if route.streams else (False,))
    ],
)

Start = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start the application with some sections of its settings changed, around an engine of one's own if given."""

    @asynccontextmanager
    async def start(engine: EchoEngine | None = None, **sections: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
        given: dict[str, dict[str, Any]] = {
            "app": {"data_dir": tmp_path},
            "model": {"engine": "echo"},
            "security": {"api_key": KEY},
            "rate_limit": {"enabled": False},
        }
        given |= {name: given.get(name, {}) | section for name, section in sections.items()}
        app = create_app(
            load_settings(tmp_path / "none.yml", None, **given), engines={"echo": engine} if engine else None
        )
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": KEY}) as http,
        ):
            yield http

    return start


def text_of(reply: httpx.Response) -> str:
    """Join the text of an answer, whichever route it is from and whether it is a stream; the first answer's."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        frames = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
        return "".join(_text(json.loads(frame)) for frame in frames if frame != "[DONE]")
    return _text(reply.json())


def _text(data: dict[str, Any]) -> str:
    if "results" in data:
        return str(data["results"][0]["generated_text"])
    if "choices" in data:
        first = [choice for choice in data["choices"] if choice["index"] == 0]
        return "".join(
            choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            for choice in first
        )
    if "message" in data:
        return str(data["message"]["content"])
    return str(data.get("generated_text", data.get("content", "")))


@every_stream
async def test_personal_data_goes_neither_in_nor_out(start, route, stream, log_lines):
    """What comes in is masked before the model sees it, and what the model says before anyone does."""
    body = route.body(f"mail {CANARY} now", max_tokens=50, stream=stream)
    async with start() as http:
        masked = await http.post(route.path, json=body)
        figures = (await http.get("/metrics")).text
    async with start(pii={"input": "off"}) as http:
        filtered = await http.post(route.path, json=body)

    assert "mail [EMAIL] now" == text_of(masked) == text_of(filtered)
    assert "jane" not in masked.text + text_of(filtered) + str(log_lines)
    assert 'pii_matches_total{direction="input",kind="email"}' in figures


@every_stream
async def test_log_probabilities_show_nothing_of_what_was_masked(start, route, stream):
    """Neither the tokens nor their alternatives show it."""
    scored = {"logprobs": True, "top_logprobs": 2} if "chat/completions" in route.path else {"logprobs": 2}
    async with start(pii={"input": "off"}) as http:
        reply = await http.post(
            route.path, json=route.body(f"mail {CANARY} now", max_tokens=50, stream=stream, **scored)
        )

    assert "mail [EMAIL] now" == text_of(reply)
    for form in ('"j"', '"@"', r"\b106\b", '"x"'):
        assert not re.search(form, reply.text)


@every_stream
async def test_the_tokens_are_counted_once_wherever_they_are_reported(start, route, stream):
    """The usage of the answer and the figures of the service agree."""
    options = {"stream_options": {"include_usage": True}} if stream and "completions" in route.path else {}
    async with start(cache={"enabled": False}) as http:
        reply = await http.post(route.path, json=route.body(max_tokens=4, stream=stream, **options))
        figures = (await http.get("/metrics")).text

    (counted,) = [line for line in figures.splitlines() if line.startswith("tokens_generated_total{")]
    frames = [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if '"usage":{' in line]
    usage = frames[-1]["results"][0]["usage"] if "results" in frames[-1] else frames[-1]["usage"]
    assert usage["completion_tokens"] == float(counted.split()[-1]) >= 4
    assert f'endpoint="{route.path}"' in figures


@every_route
async def test_a_second_request_of_its_kind_is_answered_from_the_cache(start, route):
    """Deterministic as these are, OpenAI's routes do it too, and no tenant's limits are passed by."""
    async with start() as http:
        first, second = [await http.post(route.path, json=route.body()) for _ in range(2)]
        cache = (await http.get("/status")).json()["cache"]

    assert text_of(first) == text_of(second) == "hello"
    assert cache["misses"] == 1
    assert cache["hits"] >= 1
    if "completions" in route.path:
        assert "HIT" == second.headers["x-cache"]


async def test_a_stream_of_several_prompts_claims_no_hit_that_it_cannot_know(start):
    """The header goes out before all of them are looked up; one prompt is known."""
    prompts = ["hello", ["hello", "world"], ["hello", "world"], "hello"]
    async with start() as http:
        replies = [
            await http.post("/v1/completions", json={"prompt": prompt, "seed": 1, "stream": True}) for prompt in prompts
        ]

    assert ["MISS", "MISS", "MISS", "HIT"] == [reply.headers["x-cache"] for reply in replies]


@every_stream
async def test_too_many_requests_are_refused_with_their_headers(start, route, stream):
    async with start(rate_limit={"enabled": True, "requests_per_minute": 1, "burst_size": 2}) as http:
        replies = [await http.post(route.path, json=route.body(stream=stream)) for _ in range(3)]

    assert [200, 200, 429] == [reply.status_code for reply in replies]
    assert ["1", "0", "0"] == [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert int(replies[2].headers["retry-after"]) > 0
    assert is_envelope(replies[2])


@every_stream
async def test_a_request_beyond_the_months_quota_is_refused_and_what_was_generated_is_counted(tmp_path, route, stream):
    """On OpenAI's routes as insufficient_quota, which its clients do not send again; nothing is taken for it."""
    async with running(tmp_path, cache={"enabled": False}) as service:

        async def post(key: str) -> httpx.Response:
            async with service.client(key) as http:
                reply = await http.post(route.path, json=route.body(max_tokens=4, stream=stream))
            async with asyncio.timeout(HANG_SECONDS):
                while (await service.usage(key))["reserved"]:  # noqa: ASYNC110  # committed by another task
                    await asyncio.sleep(0.01)
            return reply

        rich = await service.key(limits={"monthly_tokens": 10_000})
        await post(rich)
        cost = (await service.usage(rich))["used"]
        # Two tokens are left: with fewer, which no request does with, a batch is refused as a whole too.
        key = await service.key(limits={"monthly_tokens": 2 * cost + 2})
        replies = [await post(key) for _ in range(3)]
        used = (await service.usage(key))["used"]

    code = "insufficient_quota" if "completions" in route.path else "quota_exceeded"
    assert [False, False, True] == [code in reply.text for reply in replies]
    assert 2 * cost == used >= 2 * len("hellohell")
    assert (200 if "batch" in route.path else 429) == replies[-1].status_code
    with sqlite3.connect(tmp_path / "service.db") as database:
        assert [(route.path,)] == database.execute("SELECT DISTINCT route FROM inference_log").fetchall()


@every_stream
async def test_what_is_too_long_for_the_model_is_refused_before_it_begins(start, route, stream):
    async with start(model={"max_model_len": 16}) as http:
        reply = await http.post(route.path, json=route.body("x" * 20, stream=stream))

    # A batch has each prompt's error in its place.
    assert (200 if "batch" in route.path else 400) == reply.status_code
    assert "context_length_exceeded" in reply.text


@every_stream
async def test_a_full_model_is_our_fault_and_says_when_to_come_back(start, route, stream):
    async with start(EchoEngine(model="echo", max_running=0), model={"name": "echo"}) as http:
        reply = await http.post(route.path, json=route.body(stream=stream))

    assert 503 == reply.status_code
    assert int(reply.headers["retry-after"]) > 0
    assert is_envelope(reply)


@every_stream
async def test_a_draining_service_takes_nothing_new(route, stream):
    web = await make_web(engines={MODEL: EchoEngine()})
    await web.host.drain(0)
    async with web.client() as http:
        reply = await http.post(route.path, json=route.body(stream=stream))

    assert (503, True) == (reply.status_code, is_envelope(reply))


@every_route
async def test_every_answer_has_its_id_and_its_time(start, route):
    async with start() as http:
        reply = await http.post(route.path, json=route.body(), headers={"X-Request-ID": "mine-1"})

    assert "mine-1" == reply.headers["x-request-id"]
    assert float(reply.headers["x-process-time"]) > 0


@every_stream
async def test_a_client_that_hangs_up_frees_its_place_at_once(route, stream, log_lines):
    """The generator is closed, whatever it was doing; the log has one request."""
    web: Web = await make_web()
    web.service.steps = ["a", 60.0]
    async with web.listening() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(route.path, route.body("x", stream=stream)))
        await until(lambda: web.service.running > 0)
        await asyncio.sleep(0.02)
        hung_up = asyncio.get_running_loop().time()
        writer.close()
        await until(lambda: web.service.running == 0)
        await until(lambda: bool(log_lines))

    assert web.service.closed_at - hung_up < 10  # and not the minute that the engine waits
    assert [(route.path, 200 if stream else 499)] == [(line["route"], line["status_code"]) for line in log_lines]
