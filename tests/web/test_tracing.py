"""The spans of a request, as a collector gets them, and that there are none where nobody asked for them."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import structlog
from opentelemetry import propagate

from app.config import load_settings
from app.engine.echo import EchoEngine
from app.errors import ConfigError
from app.main import create_app
from app.telemetry.tracing import NO_TRACER
from tests.unit.engine.remote.scripted_server import ScriptedServer, serving
from tests.web.access import running
from tests.web.harness import AUTH, CHAT, KEY, ScriptedService, Web, make_web, started
from tests.web.test_batches import chat, create, ended, lines_of
from tests.web.trace_collector import Collector, collecting
from tests.web.word_encoder import WordEncoder

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
GEN_AI = [
    "gen_ai.operation.name",
    *(f"gen_ai.request.{name}" for name in ("model", "max_tokens", "temperature")),
    *("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "gen_ai.response.finish_reasons"),
]
CANARY = "a-canary-nobody-may-see"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector whose address is in the environment."""
    before = propagate.get_global_textmap()
    with collecting() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found
    propagate.set_global_textmap(before)


@asynccontextmanager
async def traced(web: Web, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client of an application, and send its spans when the block ends."""
    async with web.client(**AUTH, **headers) as client:
        yield client
    await asyncio.to_thread(web.container.tracer.close)


async def test_each_stage_of_a_request_is_a_span_of_the_client_s_trace(collector: Collector) -> None:
    """Below that of the request, which continues the caller's; the stages of the model below the generation."""
    web = await make_web(engines={"echo": EchoEngine(model="echo", token_delay_seconds=0.001)})
    chat = {"messages": [{"role": "user", "content": f"{CANARY}, from bob@example.com"}], "session_id": CANARY}
    async with traced(web, **TRACEPARENT) as client:
        answer = await client.post(f"/v1/chat?question={CANARY}", json=chat | {"max_tokens": 40, "temperature": 0.5})
    request, generation = collector.named("POST /v1/chat"), collector.named("chat echo")

    assert 200 == answer.status_code
    assert {TRACE} == {span.trace_id for span in collector.spans}
    assert (PARENT, request.span_id) == (request.parent_id, generation.parent_id)
    for name in ("admission", "pii in", "template"):
        assert request.span_id == collector.named(name).parent_id
    assert 2 == sum(span.name == "session" for span in collector.spans)
    for name in ("queue", "prefill", "decode", "pii out"):
        stage = collector.named(name)
        assert generation.span_id == stage.parent_id
        assert request.began <= stage.began <= stage.ended <= request.ended + 1_000_000
    assert collector.named("decode").ended - collector.named("decode").began > 20_000_000
    assert (200, "/v1/chat") == (request.attributes["http.response.status_code"], request.attributes["http.route"])
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "echo",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer.json()["usage"]["completion_tokens"],
        "gen_ai.response.finish_reasons": ["stop"],
    } == {name: generation.attributes[name] for name in GEN_AI}
    assert ["llm-service"] == [each["service.name"] for each in collector.resources]
    assert {"/v1/traces"} == set(collector.paths)
    assert not any(CANARY.encode() in body or KEY.encode() in body for body in collector.bodies)


async def test_texts_are_in_the_span_only_where_they_are_asked_for_and_masked(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo")}, tracing={"store_text": True})
    async with traced(web) as client:
        chat = {"messages": [{"role": "user", "content": "I am bob@example.com"}], "max_tokens": 64}
        await client.post("/v1/chat/completions", json=chat)
    attributes = collector.named("chat echo").attributes

    said = [{"type": "text", "content": "I am [EMAIL]"}]
    assert [{"role": "user", "parts": said}] == json.loads(attributes["gen_ai.input.messages"])
    assert [{"role": "assistant", "parts": said}] == json.loads(attributes["gen_ai.output.messages"])


async def test_what_ends_in_an_error_says_its_code_and_not_its_message(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo", max_running=0)}, pii={"input": "block"})
    async with traced(web) as client:
        await client.post("/v1/chat", json=CHAT)
        await client.post("/v1/chat", json={"messages": [{"role": "user", "content": "I am bob@example.com"}]})
    blocked = next(span for span in collector.spans if span.name == "pii in" and span.failed)

    assert (True, "service_unavailable") == (
        collector.named("chat echo").failed,
        collector.named("chat echo").attributes["error.type"],
    )
    assert "pii_blocked" == blocked.attributes["error.type"]


async def test_a_stream_that_its_client_leaves_is_no_error(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo", token_delay_seconds=0.01)})
    async with web.listening() as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=AUTH) as client:
            body = CHAT | {"stream": True, "max_tokens": 4000, "min_tokens": 4000}
            async with client.stream("POST", "/v1/chat", json=body) as response:
                await anext(response.aiter_lines())
        await asyncio.sleep(0.3)
    await asyncio.to_thread(web.container.tracer.close)
    generation = collector.named("chat echo")

    assert (False, ["abort"]) == (generation.failed, generation.attributes["gen_ai.response.finish_reasons"])


async def test_the_trace_goes_on_at_a_remote_engine(collector: Collector, tmp_path: Path) -> None:
    """Its server gets the trace of the request, and nothing else that the client sent along; probes are no traces."""
    server = ScriptedServer()
    async with serving(server):
        web = remote_web(server, tmp_path)
        async with started(web.app):
            await web.host.default.engine.wait_ready()
            async with web.client(**AUTH, **TRACEPARENT, baggage=f"secret={CANARY}") as client:
                assert 200 == (await client.post("/v1/chat", json=CHAT)).status_code
    (received,) = server.received
    version, trace, span, flags = received.headers["traceparent"].split("-")

    assert ("00", TRACE, "01") == (version, trace, flags)
    assert span in {each.span_id for each in collector.spans if each.name == "POST"}
    assert "baggage" not in received.headers
    assert {TRACE} == {each.trace_id for each in collector.spans}


async def test_the_trace_of_a_caller_who_does_not_record_it_still_reaches_a_remote_engine(
    collector: Collector, tmp_path: Path
) -> None:
    """As it came, so that the server behind may find its requests by it."""
    server, given = ScriptedServer(), f"00-{TRACE}-{PARENT}-00"
    async with serving(server):
        web = remote_web(server, tmp_path)
        async with started(web.app):
            await web.host.default.engine.wait_ready()
            async with web.client(**AUTH, traceparent=given) as client:
                assert 200 == (await client.post("/v1/chat", json=CHAT)).status_code
    (received,) = server.received

    assert given == received.headers["traceparent"]
    assert [] == collector.spans


async def test_a_request_for_vectors_has_its_stages_and_what_the_model_did(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo")}, encoders={"words": WordEncoder("words")})
    async with traced(web) as client:
        answer = await client.post("/v1/embeddings", json={"model": "words", "input": f"{CANARY} one two"})
    request, vectors = collector.named("POST /v1/embeddings"), collector.named("embeddings words")

    assert 200 == answer.status_code
    for name in ("admission", "pii in", "template", "embeddings words"):
        assert request.span_id == collector.named(name).parent_id
    assert ("embeddings", "words", answer.json()["usage"]["prompt_tokens"]) == (
        vectors.attributes["gen_ai.operation.name"],
        vectors.attributes["gen_ai.request.model"],
        vectors.attributes["gen_ai.usage.input_tokens"],
    )
    assert not any(CANARY.encode() in body for body in collector.bodies)


async def test_each_line_of_a_batch_is_a_trace_that_refers_to_the_span_of_the_batch(
    collector: Collector, tmp_path: Path
) -> None:
    async with running(tmp_path) as app, app.client() as http:
        batch = await create(http, lines_of([chat(f"{CANARY} {number}") for number in range(2)]))
        assert "completed" == (await ended(http, batch["id"]))["status"]
    whole = collector.named("batch")
    lines = [span for span in collector.spans if span.name == "batch line"]

    assert 2 == len(lines) == len({line.trace_id for line in lines})
    assert [[whole.span_id]] * 2 == [line.links for line in lines]
    assert {batch["id"]} == {span.attributes["llm_service.batch.id"] for span in [whole, *lines]}
    assert ("completed", 2) == (
        whole.attributes["llm_service.batch.status"],
        whole.attributes["llm_service.batch.lines.completed"],
    )
    generations = [span for span in collector.spans if span.name.startswith("chat ")]
    assert {line.span_id for line in lines} == {span.parent_id for span in generations}
    assert not any(CANARY.encode() in body for body in collector.bodies)


def test_without_a_collector_nothing_that_makes_or_sends_spans_is_there() -> None:
    """Neither the module nor a provider nor its thread; that LangSmith's client imports the SDK is its own affair."""
    code = """
import sys, threading
from opentelemetry import trace
from app.config import load_settings
from app.main import create_app
create_app(load_settings("absent.yml", None, security={"api_key": "a-key-of-16-letters"}, model={"engine": "echo"}))
assert "app.telemetry.otlp" not in sys.modules
assert type(trace.get_tracer_provider()) is trace.ProxyTracerProvider
assert not any(thread.name.startswith("Otel") for thread in threading.enumerate())
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert 0 == ended.returncode, ended.stderr


def remote_web(server: ScriptedServer, folder: Path) -> Web:
    """Return the application as the settings make it, with another server as its engine."""
    settings = load_settings(
        "absent.yml",
        None,
        app={"data_dir": folder},
        security={"api_key": KEY},
        model={"engine": "remote", "name": "m"},
        remote={"base_urls": [server.url]},
    )
    return Web(app=create_app(settings), service=ScriptedService())


async def test_a_trace_that_is_not_sampled_has_no_spans(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo")})
    async with traced(web, traceparent=f"00-{TRACE}-{PARENT}-00") as client:
        await client.post("/v1/chat", json=CHAT)

    assert [] == collector.spans


async def test_without_a_collector_nothing_is_measured_and_the_log_knows_the_trace_all_the_same() -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo")})
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with web.client(**AUTH, **TRACEPARENT) as client:
            await client.post("/v1/chat", json=CHAT)

    assert web.container.tracer is NO_TRACER
    assert [TRACE] == [line["trace_id"] for line in lines if line["event"] == "POST /v1/chat - 200"]


async def test_the_log_names_the_trace_that_the_service_began(collector: Collector) -> None:
    web = await make_web(engines={"echo": EchoEngine(model="echo")})
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with traced(web) as client:
            await client.post("/v1/chat", json=CHAT)

    assert [collector.named("POST /v1/chat").trace_id] == [
        line["trace_id"] for line in lines if line["event"] == "POST /v1/chat - 200"
    ]


def test_a_collector_without_what_sends_traces_is_refused_by_the_name_of_the_extra(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "app.telemetry.otlp", None)

    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*\[tracing\]"):
        create_app(load_settings("absent.yml", None, security={"api_key": KEY}, model={"engine": "echo"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ENDPOINT", "localhost:4317"), ("ENDPOINT", "ftp://host"), ("PROTOCOL", "grpc")],
)
def test_an_address_that_is_none_and_another_protocol_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)

    with pytest.raises(ConfigError, match=f"otel_exporter_otlp_{name.lower()}"):
        load_settings("absent.yml", None)
