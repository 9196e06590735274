"""Which of several servers gets a request, and what happens while one is away."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from app.config.remote import RemoteConfig
from app.engine.remote.breaker import MOST_FAILURES, UpstreamBreaker
from app.errors import AppError, EngineBusy, EngineFailed, EngineNotReady
from app.types import EngineState
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import (
    CARD,
    DONE,
    FOREVER,
    HELLO,
    Reply,
    ScriptedServer,
    chunk,
    engine_on,
    make_engine,
    serving,
)
from tests.unit.event_streams import read, text_of
from tests.waiting import HANG_SECONDS, until

REFUSED = Reply.json({"error": {"message": "no"}}, 500)
FULL = Reply.json({"error": {"message": "full"}}, 503, retry_after="7")


async def test_requests_go_to_the_server_that_has_the_fewest():
    """Those without a session."""
    waiting = [ScriptedServer([Reply(delay_seconds=FOREVER)]) for _ in range(3)]
    async with engine_on(*waiting) as engine:
        reading = [asyncio.create_task(read(engine.stream(make_request(f"r{number}")))) for number in range(6)]
        await until(lambda: sum(len(server.received) for server in waiting) == 6)
        running = [upstream.running for upstream in engine.status().upstreams]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    assert [2, 2, 2] == running == [len(server.received) for server in waiting]


async def test_a_session_comes_back_to_its_server_and_finds_another_while_that_is_down():
    """All sessions together are spread over the servers."""
    servers = [ScriptedServer() for _ in range(3)]

    def served() -> list[int]:
        counts = [len(server.received) for server in servers]
        for server in servers:
            server.received.clear()
        return counts

    async with engine_on(*servers) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))
        homes = Counter[int]()
        for session in range(12):
            for turn in range(3):
                await read(engine.stream(make_request(f"s{session}.{turn}", session_id=f"s{session}")))
            counts = served()
            assert 3 == max(counts)
            homes[counts.index(3)] += 1
        assert 3 == len(homes)

        await read(engine.stream(make_request("a", session_id="s0")))
        home = served().index(1)
        await servers[home].stop()
        for turn in range(2):
            assert "Hello" == text_of(await read(engine.stream(make_request(f"b{turn}", session_id="s0"))))
        counts = served()
        assert (0, 2) == (counts[home], max(counts))


async def test_a_session_does_not_wait_in_line_while_other_servers_are_idle():
    servers = [ScriptedServer([Reply(delay_seconds=FOREVER)]) for _ in range(2)]
    async with engine_on(*servers) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))
        streams = [engine.stream(make_request(f"r{number}", session_id="s")) for number in range(12)]
        reading = [asyncio.create_task(read(stream)) for stream in streams]
        await until(lambda: sum(len(server.received) for server in servers) == 12)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    assert all(len(server.received) >= 2 for server in servers)


async def test_a_request_goes_on_to_the_next_server_where_one_cannot_be_reached():
    """Nobody notices, and the one that is away gets nothing more until a probe has reached it."""
    servers = [ScriptedServer(), ScriptedServer()]
    async with engine_on(*servers) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))
        await servers[0].stop()
        texts = [text_of(await read(engine.stream(make_request(f"r{number}")))) for number in range(4)]

        assert ["Hello"] * 4 == texts
        status = engine.status()
        assert [False, True] == [each.ready for each in status.upstreams]
        assert (EngineState.READY, 1) == (status.state, status.upstreams[0].failures)
        await servers[0].start()
        await until(lambda: engine.status().upstreams[0].ready)


async def test_a_server_that_takes_no_connection_is_given_up_after_the_time_to_connect():
    """Its host drops what is sent to it: nothing is refused, and nothing answers."""
    servers = [ScriptedServer(), ScriptedServer()]
    async with engine_on(*servers, connect_seconds=0.2) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))
        await servers[0].stop()
        with full_listener(servers[0].port):
            async with asyncio.timeout(HANG_SECONDS):
                assert "Hello" == text_of(await read(engine.stream(make_request())))

            assert [False, True] == [each.ready for each in engine.status().upstreams]


@contextmanager
def full_listener(port: int) -> Iterator[None]:
    """Listen on a port with a queue that is full, so that further connections get no answer."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield


@pytest.mark.parametrize("first", [FULL, Reply.json({}, 429), Reply(status=502), Reply(status=401), Reply(status=404)])
async def test_a_server_that_does_not_take_a_request_leaves_it_to_the_next(first: Reply):
    servers = [ScriptedServer([first]), ScriptedServer()]
    async with engine_on(*servers) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))

        assert "Hello" == text_of(await read(engine.stream(make_request())))


@pytest.mark.parametrize("first", [REFUSED, Reply.json({}, 400), Reply([chunk("Hel")]), Reply(status=302)])
async def test_a_request_that_a_server_has_worked_on_is_not_sent_again(first: Reply):
    """It may be the reason why that failed, and text that was sent cannot be taken back."""
    servers = [ScriptedServer([first]), ScriptedServer()]
    async with engine_on(*servers) as engine:
        await until(lambda: all(each.ready for each in engine.status().upstreams))
        with pytest.raises(AppError):
            await read(engine.stream(make_request()))

    assert not servers[1].received


async def test_a_connection_that_breaks_before_the_answer_is_replaced_once():
    """A kept one may have been closed at this moment; twice in a row is a failure."""
    server = ScriptedServer([Reply(drops=True), HELLO, Reply(drops=True)])
    async with engine_on(server) as engine:
        assert "Hello" == text_of(await read(engine.stream(make_request())))
        with pytest.raises(EngineNotReady):
            await read(engine.stream(make_request()))

        assert 4 == len(server.received)
        assert 3 == engine.status().upstreams[0].failures


async def test_a_full_server_is_said_to_be_full_and_when_to_come_back():
    """Not as the caller's doing, even where it says 429: that is what this service may ask of it."""
    for status in (503, 429):
        server = ScriptedServer([Reply.json({"error": {"message": "full"}}, status, retry_after="7")])
        async with engine_on(server) as engine:
            with pytest.raises(EngineBusy) as refused:
                await read(engine.stream(make_request()))

            assert 7 == refused.value.retry_after
            assert 0 == engine.status().upstreams[0].failures


async def test_a_server_that_fails_again_and_again_gets_nothing_until_a_probe_has_reached_it():
    server = ScriptedServer([REFUSED])
    async with engine_on(server, probe_seconds=0.3) as engine:
        for number in range(MOST_FAILURES):
            with pytest.raises(EngineFailed):
                await read(engine.stream(make_request(f"r{number}")))
        with pytest.raises(EngineNotReady):
            await read(engine.stream(make_request("one more")))

        assert EngineState.UNRESPONSIVE == engine.status().state
        assert MOST_FAILURES == len(server.received)
        server.replies = [HELLO]
        await until(lambda: engine.status().state is EngineState.READY)
        assert "Hello" == text_of(await read(engine.stream(make_request())))


def test_failures_that_are_long_ago_do_not_open_a_breaker():
    breaker = UpstreamBreaker()
    breaker.close()

    for _ in range(20):
        breaker.failed()
        breaker.succeeded()
        breaker.succeeded()

    assert (False, 20) == (breaker.is_open, breaker.failures)


async def test_an_engine_waits_for_its_servers():
    """Until one answers it is loading; then it serves, whether the others do or not."""
    server, nobody = ScriptedServer(), ScriptedServer()
    async with serving(server, nobody):
        await server.stop()
        await nobody.stop()
        engine = make_engine(server, nobody)
        await engine.start()
        await until(lambda: engine.status().error is not None)
        assert EngineState.LOADING == engine.status().state
        with pytest.raises(EngineNotReady):
            await read(engine.stream(make_request()))

        await server.start()
        async with asyncio.timeout(HANG_SECONDS):
            await engine.wait_ready()
        assert "Hello" == text_of(await read(engine.stream(make_request())))
        await engine.close()


async def test_a_server_that_serves_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch):
    """So that nobody's request has to find out that it is gone; what does not change is asked once."""
    monkeypatch.setattr("app.engine.remote.pool.HEALTH_SECONDS", 0.05)
    tokenize = {"/tokenize": Reply.json({"count": 1})}
    server = ScriptedServer(models=Reply.json({"data": [CARD | {"owned_by": "vllm"}]}), others=tokenize)
    async with engine_on(server) as engine:
        await until(lambda: server.requests["/v1/models"] > 3)
        assert 1 == server.requests["/tokenize"]

        await server.stop()
        await until(lambda: engine.status().state is EngineState.UNRESPONSIVE)


async def test_a_server_that_is_too_busy_for_a_probe_keeps_its_requests(monkeypatch: pytest.MonkeyPatch):
    """An idle one that does not answer gets none."""
    monkeypatch.setattr("app.engine.remote.pool.HEALTH_SECONDS", 0.05)
    monkeypatch.setattr("app.engine.remote.upstream.PROBE_TIMEOUT_SECONDS", 0.1)
    server = ScriptedServer([Reply([chunk("a"), 0.5, chunk("b", finish_reason="stop"), DONE])])
    async with engine_on(server) as engine:
        reading = asyncio.create_task(read(engine.stream(make_request())))
        await until(lambda: bool(server.received))
        server.models = Reply(delay_seconds=FOREVER)
        before = server.requests["/v1/models"]
        await until(lambda: server.requests["/v1/models"] > before + 2)
        assert engine.status().upstreams[0].ready
        assert "ab" == text_of(await reading)
        await until(lambda: not engine.status().upstreams[0].ready)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (Reply.json({}, 401), "refuses the configured key"),
        (Reply.json({"data": [CARD | {"id": "a"}, CARD | {"id": "b"}]}), "it has no model m, but a, b"),
        (Reply.json({"data": []}), "none that generates"),
    ],
)
async def test_a_server_that_refuses_ends_the_start_and_may_be_corrected_later(models: Reply, said: str):
    server = ScriptedServer(models=models)
    async with serving(server):
        engine = make_engine(server)
        await engine.start()
        with pytest.raises(EngineFailed, match=said):
            async with asyncio.timeout(HANG_SECONDS):
                await engine.wait_ready()
        assert EngineState.FAILED == engine.status().state

        server.models = ScriptedServer().models
        await until(lambda: engine.status().state is EngineState.READY)
        await engine.close()


@pytest.mark.parametrize(
    "models",
    [Reply([b"<html>"]), Reply.json({"data": "x"}), Reply(status=503), Reply([b"x" * 5_000_000])],
    ids=range(4),
)
async def test_a_server_whose_list_of_models_cannot_be_read_may_be_starting(models: Reply):
    server = ScriptedServer(models=models)
    async with serving(server):
        engine = make_engine(server)
        await engine.start()
        await until(lambda: engine.status().error is not None)

        assert EngineState.LOADING == engine.status().state
        await engine.close()
        assert EngineState.CLOSED == engine.status().state


async def test_a_redirect_is_not_followed():
    """The key would go with it."""
    other = ScriptedServer()
    async with serving(other):
        server = ScriptedServer([Reply(status=307, headers={"location": f"{other.url}/chat/completions"})])
        async with engine_on(server) as engine:
            with pytest.raises(EngineFailed, match="status 307"):
                await read(engine.stream(make_request()))

    assert not other.received


async def test_a_tenant_cannot_take_all_connections_while_others_wait():
    server = ScriptedServer([Reply([chunk("a"), FOREVER, DONE])])
    async with engine_on(server, max_connections=4) as engine:
        reading = [asyncio.create_task(read(engine.stream(make_request(f"r{number}")))) for number in range(4)]
        await until(lambda: len(server.received) == 4)
        with pytest.raises(EngineBusy):
            await read(engine.stream(make_request("one more")))
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"base_urls": ["localhost:8000"]},
        {"base_urls": ["http://user:pw@host"]},
        {"base_urls": ["http://host/v1?key=1"]},
        {"base_urls": ["http://host:99999"]},
        {"base_urls": ["http://host", "http://host/v1/"]},
        {"api_key": "two words"},
        {"headers": {"Authorization": "x"}},
        {"headers": {"a b": "x"}},
        {"headers": {"X-A": "x\ny"}},
        {"unsupported": ["speed"]},
    ],
)
def test_settings_that_cannot_be_right_are_refused_without_being_repeated(fields: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(fields))) as refused:
        RemoteConfig.model_validate(fields)

    assert "pw" not in str(refused.value)
