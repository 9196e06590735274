"""What becomes of the streams that servers send: odd ones are read, broken ones end in one error."""

import asyncio
import logging
from typing import Any

import pytest

from app.config import DeadlineConfig
from app.errors import AppError, DeadlineExceeded, EngineFailed, InvalidRequest
from app.events import Event, Finished, Started, join_tool_calls
from app.types import FinishReason, Tool, ToolCall, Usage
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import (
    DONE,
    FOREVER,
    HELLO,
    Reply,
    ScriptedServer,
    chunk,
    engine_on,
    event,
)
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, read, read_into, text_of
from tests.waiting import until

ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
END = chunk(finish_reason="stop")

ODD: dict[str, list[Any]] = {
    "no usage": [chunk("Hel"), chunk("lo"), END, DONE],
    "no end mark": [chunk("Hel"), chunk("lo"), END],
    "no reason": [chunk("Hel"), chunk("lo"), DONE],
    "an empty reason": [chunk("Hel", finish_reason=""), chunk("lo"), END, DONE],
    "roles repeated": [ROLE, chunk("Hel", delta={"role": "assistant"}), ROLE, chunk("lo"), END, DONE],
    "comments": [b": keep-alive\n\n", chunk("Hel"), b":\n\n", chunk("lo"), END, b": bye\n\n", DONE],
    "carriage returns": [(chunk("Hel") + chunk("lo") + END + DONE).replace(b"\n", b"\r\n")],
    "byte by byte": [bytes([byte]) for byte in chunk("Hel") + chunk("lo") + END + DONE],
    "events with names": [b"event: message\nid: 1\n" + chunk("Hel"), chunk("lo"), END, DONE],
    "no space behind the colon": [chunk("Hel").replace(b"data: ", b"data:"), chunk("lo"), END, DONE],
    "no last line break": [chunk("Hel"), chunk("lo"), END.rstrip(b"\n")],
    "usage that is null": [chunk("Hel"), event({"choices": [], "usage": None}), chunk("lo"), END, DONE],
    "another end": [chunk("Hel"), chunk("lo", finish_reason="eos_token"), DONE],
    "fields of its own": [event({"choices": [{"delta": {"content": "Hello"}, "x": {}}], "timings": {}}), END, DONE],
    "an end that stays open": [chunk("Hel"), chunk("lo"), END, FOREVER],
}
BROKEN = {
    "a page": (Reply([b"<html>"], headers={"content-type": "text/html; charset=utf-8"}), "text/html"),
    "garbage": (Reply([chunk("Hel"), b"data: {not json\n\n", DONE]), "no JSON"),
    "a long line": (Reply([chunk("Hel"), b"data: " + b"x" * 10_000_000 + b"\n\n"]), "a line of more than"),
    "a cut character": (Reply([chunk("Hel"), b'data: {"choices": [{"text": "\xe2\x82"}]}\n\n', DONE]), "no JSON"),
    "another shape": (Reply([event({"choices": "none"})]), "no chunk"),
    "an end in the middle": (Reply([chunk("Hel")]), "in the middle of the answer"),
    "nothing": (Reply(), "in the middle of the answer"),
    "silence": (Reply([chunk("Hel"), FOREVER]), "fell silent"),
    "a reset": (Reply([chunk("Hel")], resets=True, headers={"content-length": "9999"}), "connection"),
    "an error": (Reply([chunk("Hel"), event({"error": {"message": "out of memory"}}), DONE]), "out of memory"),
    "an error as text": (Reply([event({"error": "out of memory"})]), "out of memory"),
    "an end that is none": (Reply([chunk("Hel", finish_reason="error"), DONE]), "broke this answer off"),
}


async def answer(reply: Reply, **settings: Any) -> list[Event]:
    """Return the events of one request that gets this reply."""
    request = settings.pop("request", None) or make_request()
    async with engine_on(ScriptedServer([reply]), **settings) as engine:
        return await read(engine.stream(request))


async def test_a_stream_is_its_text_its_usage_and_its_end():
    request = make_request()

    events = await answer(HELLO, request=request)

    assert Started(prompt_tokens=9) == events[0]
    assert "Hello" == text_of(events)
    assert (FinishReason.STOP, Usage(7, 2)) == (finished_of(events).finish_reason, finished_of(events).usage)
    assert 2 == request.progress.generated == sum(delta.tokens for delta in deltas_of(events))


@pytest.mark.parametrize("steps", ODD.values(), ids=ODD)
async def test_odd_streams_are_read_and_counted(steps: list[Any], monkeypatch: pytest.MonkeyPatch):
    """As llama.cpp, llama-cpp-python, Ollama and proxies write them."""
    monkeypatch.setattr("app.engine.remote.live_stream.TAIL_SECONDS", 0.1)

    events = await answer(Reply(steps))

    assert ("Hello", FinishReason.STOP) == (text_of(events), finished_of(events).finish_reason)
    assert finished_of(events).usage.completion_tokens in (1, 2)
    assert 9 == finished_of(events).usage.prompt_tokens


async def test_a_server_that_does_not_stream_is_read_whole():
    body = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "length"}]}
    counted = body | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}

    events = await answer(Reply.json(counted))

    assert ("Hello", FinishReason.LENGTH, Usage(7, 2)) == (
        text_of(events),
        finished_of(events).finish_reason,
        finished_of(events).usage,
    )


@pytest.mark.parametrize(("reply", "said"), BROKEN.values(), ids=BROKEN)
async def test_a_broken_stream_ends_in_one_error_that_says_what_is_wrong(reply: Reply, said: str):
    """After the text that came before; and the connection is given up at once."""
    events: list[Event] = []
    server = ScriptedServer([reply])
    async with engine_on(server, idle_seconds=0.3) as engine:
        with pytest.raises(EngineFailed, match=said):
            await read_into(events, engine.stream(make_request()))
        assert (0, 0) == (engine.status().running, engine.status().waiting)
        upstream = engine.status().upstreams[0]

    assert 1 == upstream.failures
    assert "out of memory" not in (upstream.error or "")
    assert isinstance(events[0], Started)
    assert not any(isinstance(each, Finished) for each in events)


async def test_an_error_in_a_stream_that_is_the_requests_own_counts_against_nobody():
    error = {"message": "too long", "code": 400, "param": "messages"}
    async with engine_on(ScriptedServer([Reply([event({"error": error})])])) as engine:
        with pytest.raises(InvalidRequest, match="too long"):
            await read(engine.stream(make_request()))

        assert 0 == engine.status().upstreams[0].failures


@pytest.mark.parametrize("delay", [0.0, FOREVER], ids=["in the stream", "before it"])
async def test_a_server_that_sends_no_token_is_given_up(delay: float):
    """Whether it keeps the connection open with comments or not."""
    reply = Reply([b": wait\n\n", 0.1, b": wait\n\n", FOREVER], delay_seconds=delay)
    deadlines = DeadlineConfig(waiting_seconds=0.2, first_token_seconds=0.1, total_seconds=5)

    with pytest.raises(DeadlineExceeded, match="first token"):
        await answer(reply, deadlines=deadlines)


async def test_an_answer_has_an_end_however_steadily_it_comes():
    steps: list[bytes | float] = [each for number in range(100) for each in (chunk(str(number)), 0.02)]

    with pytest.raises(DeadlineExceeded, match="too long"):
        await answer(Reply(steps), deadlines=DeadlineConfig(total_seconds=0.4))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("delay", [0.0, FOREVER], ids=["in the stream", "before it"])
async def test_whoever_hangs_up_ends_the_request_at_the_server_within_a_second(stream: bool, delay: float):
    """Streaming or not, whether the server has answered or not."""
    server = ScriptedServer([Reply([chunk("Hel"), FOREVER], delay_seconds=delay)])
    async with engine_on(server) as engine:
        events: list[Event] = []
        reading = asyncio.create_task(read_into(events, engine.stream(make_request(stream=stream))))
        await until(lambda: bool(server.received and (events[1:] or delay)))

        reading.cancel()
        await until(lambda: server.hung_up > 0)

        assert (0, 0) == (engine.status().running, engine.status().waiting)
        assert 0 == engine.status().upstreams[0].running


async def test_an_abort_ends_a_request_that_no_server_has_taken():
    server = ScriptedServer([Reply(delay_seconds=FOREVER)])
    async with engine_on(server) as engine:
        reading = asyncio.create_task(read(engine.stream(make_request("mine"))))
        await until(lambda: bool(server.received))
        await engine.abort("mine")

        events = await reading

    assert [Started(prompt_tokens=9)] == events[:1]
    assert FinishReason.ABORT == finished_of(events).finish_reason


async def test_closing_ends_live_requests_with_what_they_have():
    server = ScriptedServer([Reply([chunk("Hel"), FOREVER])])
    async with engine_on(server) as engine:
        events: list[Event] = []
        reading = asyncio.create_task(read_into(events, engine.stream(make_request())))
        await until(lambda: len(events) == 2)
        await engine.close()
        await reading

    assert ("Hel", FinishReason.ABORT) == (text_of(events), finished_of(events).finish_reason)


async def test_a_stop_string_that_the_server_does_not_name_is_found_here():
    """However its text is cut; the server is told by a hang-up."""
    server = ScriptedServer([Reply([chunk("one S"), chunk("TOP two"), FOREVER])])
    async with engine_on(server) as engine:
        events = await read(engine.stream(make_request(sampling={"stop": ("STOP",)})))
        await until(lambda: server.hung_up > 0)

    assert ("one ", FinishReason.STOP, "STOP") == (
        text_of(events),
        finished_of(events).finish_reason,
        finished_of(events).samples[0].stop_reason,
    )
    assert "stop" not in server.received[0].body


async def test_calls_of_tools_have_one_position_id_and_name_each():
    """Whatever of that a server leaves out, repeats or numbers alike; arguments may come as an object."""
    first = {"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x"'}}
    more = {"index": 0, "id": "a", "function": {"name": "add", "arguments": ": 1}"}}
    second = {"index": 0, "id": "b", "function": {"name": "sub", "arguments": {"y": 2}}}
    third = {"function": {"name": "now", "arguments": "{}"}}
    steps = [chunk(delta={"tool_calls": [each]}) for each in (first, more, second, third)]

    events = await answer(Reply([*steps, END, DONE]), request=make_request(tools=(Tool("add"),)))

    parts = [part for delta in deltas_of(events) for part in delta.tool_calls]
    *known, third_call = join_tool_calls(parts)
    assert [ToolCall("a", "add", '{"x": 1}'), ToolCall("b", "sub", '{"y": 2}')] == known
    assert ("now", "{}") == (third_call.name, third_call.arguments)
    assert third_call.id
    assert ["a", None, "b"] == [part.id for part in parts[:3]]
    assert FinishReason.TOOL_CALLS == finished_of(events).finish_reason


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_reasoning_is_read_under_both_of_its_names(name: str):
    events = await answer(Reply([chunk(delta={name: "Hm."}), chunk("Yes"), END, DONE]))

    assert ("Hm.", "Yes") == ("".join(delta.reasoning for delta in deltas_of(events)), text_of(events))
    assert 2 == finished_of(events).usage.completion_tokens


async def test_log_probabilities_are_placed_in_the_text_and_those_of_reasoning_are_none_of_its():
    def scored(text: str) -> dict[str, Any]:
        top = [{"token": "x", "logprob": -3.0}, {"token": text, "logprob": -1.0}]
        return {"content": [{"token": text, "logprob": -1.0, "bytes": list(text.encode()), "top_logprobs": top}]}

    steps = [
        chunk(delta={"reasoning": "Hm."}, logprobs=scored("Hm.")),
        chunk("Ye", logprobs=scored("Ye")),
        chunk("s.", logprobs=scored("s.")),
        chunk(finish_reason="stop"),
    ]
    events = await answer(Reply([*steps, DONE]), request=make_request(sampling={"logprobs": 2}))

    assert ["Ye", "s."] == [token.text for token in logprobs_of(events)]
    assert [["Ye", "x"], ["s.", "x"]] == [[top.text for top in token.top] for token in logprobs_of(events)]
    ends = [delta.token_ends for delta in deltas_of(events) if delta.logprobs]
    assert ends in ([(2,), (2,)], [(2, 4)])
    assert 3 == finished_of(events).usage.completion_tokens


async def test_what_arrives_together_is_passed_on_together_and_what_does_not_at_once():
    """A reader that is slower than the server then catches up."""
    steps: list[bytes | float] = [chunk("a") + chunk("b") + chunk("c"), 0.1, chunk("d") + END + DONE]
    events = await answer(Reply(steps))

    assert [("abc", 3), ("d", 1)] == [(delta.text, delta.tokens) for delta in deltas_of(events)]


async def test_a_server_that_counts_nothing_and_sends_long_chunks_is_counted_by_its_text():
    events = await answer(Reply([chunk("word " * 100), END, DONE]))

    assert 125 == finished_of(events).usage.completion_tokens


async def test_a_request_that_is_refused_says_why_and_names_the_field():
    error = {"error": {"message": "too many tokens", "param": "messages", "code": "context_length_exceeded"}}
    with pytest.raises(InvalidRequest, match="too many tokens") as refused:
        await answer(Reply.json(error, 400))

    assert "messages" == refused.value.details["errors"][0]["field"]


async def test_what_goes_wrong_names_neither_the_key_nor_the_address(caplog: pytest.LogCaptureFixture):
    """Not even where the server repeats them; the log has the address alone."""
    caplog.set_level(logging.DEBUG)
    server = ScriptedServer()
    await server.start()
    secrets = ["sk-very-secret", "in-a-header", f"127.0.0.1:{server.port}"]
    server.replies = [
        Reply.json({"error": {"message": f"no: {' '.join(secrets)}"}}, 400),
        Reply([event({"error": {"message": f"no: {' '.join(secrets)}"}})]),
        Reply.json({"error": {"message": " ".join(secrets)}}, 401),
    ]
    await server.stop()
    async with engine_on(server, api_key=secrets[0], headers={"X-Extra": secrets[1]}) as engine:
        errors: list[AppError] = []
        for _ in server.replies:
            with pytest.raises(AppError) as raised:
                await read(engine.stream(make_request()))
            errors.append(raised.value)
        status = engine.status()

    said = " ".join([*(f"{each.message} {each.details}" for each in errors), str(status)])
    assert not [secret for secret in secrets if secret in said]
    assert secrets[2] in caplog.text
    assert not [secret for secret in secrets[:2] if secret in caplog.text]
    assert [f"Bearer {secrets[0]}", secrets[1]] == [
        server.received[0].headers[name] for name in ("authorization", "x-extra")
    ]
