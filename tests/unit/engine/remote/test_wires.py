"""Streams and errors in the very words of each kind of server, and what becomes of them here."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from app.errors import AppError, EngineBusy, EngineFailed, InvalidRequest
from app.events import Event, join_tool_calls
from app.types import FinishReason, Tool
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import DONE, Reply, ScriptedServer, engine_on, event
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, read, text_of

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def of_chat(delta: dict[str, Any], reason: str | None = None, **fields: Any) -> bytes:
    """Return a chunk; fields stand beside the choices, or beside the delta where they are of the choice."""
    own = {name: fields.pop(name) for name in ("logprobs", "matched_stop", "stop_reason") if name in fields}
    choice = {"index": 0, "delta": delta, "finish_reason": reason} | own
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return event(frame | fields)


def of_usage(prompt: int, completion: int, **fields: Any) -> bytes:
    counted = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event({"object": "chat.completion.chunk", "choices": [], "usage": counted} | fields)


TIMINGS = {"cache_n": 0, "prompt_n": 7, "prompt_ms": 1.5, "predicted_n": 2, "predicted_ms": 3.1}
STREAMS: dict[str, tuple[list[bytes], tuple[str, str, int, int]]] = {
    "vllm": (
        [
            of_chat({"role": "assistant", "content": ""}, logprobs=None, stop_reason=None),
            of_chat({"content": "Hel"}, usage={"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}),
            of_chat({"content": "lo"}, usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}),
            of_chat({"content": ""}, "stop", stop_reason=None),
            of_usage(7, 2),
            DONE,
        ],
        ("Hello", "stop", 7, 2),
    ),
    "sglang": (
        [
            of_chat({"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}),
            of_chat({"role": None, "content": "Hel", "reasoning_content": None, "tool_calls": None}, usage=None),
            of_chat({"role": None, "content": "lo", "tool_calls": None}, matched_stop=None),
            of_chat({"role": None, "content": None}, "length", matched_stop=None),
            of_usage(7, 2),
            DONE,
        ],
        ("Hello", "length", 7, 2),
    ),
    "tgi": (
        [
            of_chat({"role": "assistant", "content": "Hel"}, logprobs=None, usage=None),
            of_chat({"role": "assistant", "content": "lo"}, logprobs=None, usage=None),
            of_chat({"role": "assistant", "content": ""}, "eos_token", logprobs=None, usage=None),
            of_usage(7, 3),
            DONE,
        ],
        ("Hello", "stop", 7, 3),
    ),
    "llama.cpp": (
        [
            of_chat({"role": "assistant", "content": None}),
            of_chat({"content": "Hel"}),
            of_chat({"content": "lo"}),
            of_chat({}, "stop", timings=TIMINGS),
            of_usage(7, 2, timings=TIMINGS),
            DONE,
        ],
        ("Hello", "stop", 7, 2),
    ),
    "llama-cpp-python": (
        [
            of_chat({"role": "assistant"}, logprobs=None),
            of_chat({"content": "Hel"}, logprobs=None),
            b": ping - 2026-12-01 00:00:00\r\n\r\n",
            of_chat({"content": "lo"}, logprobs=None),
            of_chat({}, "stop", logprobs=None),
            DONE,
        ],
        ("Hello", "stop", 9, 2),
    ),
    "ollama": (
        [
            of_chat({"role": "assistant", "content": "Hel"}, system_fingerprint="fp_ollama"),
            of_chat({"role": "assistant", "content": "lo"}, system_fingerprint="fp_ollama"),
            of_chat({"role": "assistant", "content": ""}, "stop", system_fingerprint="fp_ollama"),
            DONE,
        ],
        ("Hello", "stop", 9, 2),
    ),
    "transformers": (
        [
            of_chat({"role": "assistant"}),
            of_chat({"content": "Hel"}) + of_chat({"content": "lo"}),
            event(
                {
                    "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                }
            ),
        ],
        ("Hello", "length", 7, 2),
    ),
}
"""Text, reason and both counts that are to come of it; 9 is the length of the prompt as it was counted here."""


async def answer(reply: Reply, server: str, **request: Any) -> list[Event]:
    kind = "llama.cpp" if server == "llama-cpp-python" else server
    async with engine_on(ScriptedServer([reply]), server=kind, model="m") as engine:
        return await read(engine.stream(make_request(**request)))


@pytest.mark.parametrize("server", STREAMS)
async def test_a_stream_is_understood_as_each_server_writes_it(server: str):
    steps, (text, reason, prompt, completion) = STREAMS[server]

    events = await answer(Reply(steps), server)

    finished = finished_of(events)
    assert (text, FinishReason(reason)) == (text_of(events), finished.finish_reason)
    assert (prompt, completion) == (finished.usage.prompt_tokens, finished.usage.completion_tokens)
    assert completion == sum(delta.tokens for delta in deltas_of(events))


def call(name: str, arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | fields


CALLS: dict[str, list[bytes]] = {
    "vllm": [
        of_chat({"tool_calls": [call("add", "", id="a", index=0)]}),
        of_chat({"tool_calls": [{"index": 0, "function": {"arguments": '{"x"'}}]}),
        of_chat({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
        of_chat({"content": ""}, "tool_calls"),
    ],
    "tgi": [of_chat({"role": "assistant", "tool_calls": [call("add", '{"x": 1}', id="0", index=0)]}, "stop")],
    "ollama": [
        of_chat({"role": "assistant", "content": "", "tool_calls": [call("add", '{"x": 1}', id="call_1", index=0)]}),
        of_chat({"role": "assistant", "content": ""}, "tool_calls"),
    ],
    "transformers": [of_chat({"tool_calls": [call("add", '{"x": 1}', id="c_tool_call_0", index=0)]}, "tool_calls")],
}


@pytest.mark.parametrize("server", CALLS)
async def test_a_call_of_a_tool_is_understood_as_each_server_writes_it(server: str):
    events = await answer(Reply([*CALLS[server], DONE]), server, tools=(Tool("add"),))

    (called,) = join_tool_calls(part for delta in deltas_of(events) for part in delta.tool_calls)
    assert ("add", '{"x": 1}') == (called.name, called.arguments)
    assert FinishReason.TOOL_CALLS == finished_of(events).finish_reason


async def test_log_probabilities_come_without_bytes_and_alternatives_from_some():
    """TGI has no bytes, llama.cpp has its own fields beside OpenAI's."""
    tgi = {"content": [{"token": "Yes", "logprob": -0.5, "top_logprobs": []}]}
    llama = {"content": [{"id": 7, "token": "Yes", "bytes": [89, 101, 115], "logprob": -0.5, "top_logprobs": []}]}
    for server, given in (("tgi", tgi), ("llama.cpp", llama)):
        steps = [of_chat({"content": "Yes"}, logprobs=given), of_chat({}, "stop"), DONE]
        events = await answer(Reply(steps), server, sampling={"logprobs": 2})

        assert [("Yes", b"Yes", -0.5)] == [(each.text, each.raw, each.logprob) for each in logprobs_of(events)]


@dataclass(frozen=True)
class Refusal:
    """What a server says, and what a client of this service is to be told."""

    server: str
    status: int
    body: Any
    kind: type[AppError]
    said: str = ""
    headers: dict[str, str] = field(default_factory=dict)


REFUSALS = (
    Refusal("vllm", 400, {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, InvalidRequest),
    Refusal("sglang", 400, {"object": "error", "message": "too long", "type": "BadRequestError"}, InvalidRequest),
    Refusal("tgi", 422, {"error": "Input validation error: too long", "error_type": "validation"}, InvalidRequest),
    Refusal("tgi", 429, {"error": "Model is overloaded", "error_type": "overloaded"}, EngineBusy, "no more requests"),
    Refusal("tgi", 424, {"error": "CUDA: no memory", "error_type": "generation"}, EngineFailed, "status 424"),
    Refusal(
        "llama.cpp",
        400,
        {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 512}},
        InvalidRequest,
    ),
    Refusal(
        "llama.cpp",
        503,
        {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
        EngineBusy,
        "no more requests",
    ),
    Refusal(
        "ollama",
        404,
        {"error": {"message": "model 'm' not found", "type": "not_found_error", "param": None, "code": None}},
        EngineFailed,
        "does not have this model",
    ),
    Refusal("ollama", 503, {"error": "server busy, maximum pending requests exceeded"}, EngineBusy, "no more"),
    Refusal("transformers", 422, {"detail": "too long"}, InvalidRequest),
    Refusal("transformers", 503, {"error": "the worker is dead"}, EngineBusy, "no more requests"),
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda each: f"{each.server} {each.status}")
async def test_a_refusal_is_read_in_each_server_s_shape(refusal: Refusal):
    """A fault of the request in the server's words, all others in words of this service."""
    with pytest.raises(refusal.kind, match=refusal.said or "too long"):
        await answer(Reply.json(refusal.body, refusal.status), refusal.server)


BREAKS: dict[str, bytes] = {
    "vllm": event({"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}}),
    "sglang": event({"error": {"object": "error", "message": "out of memory", "type": "InternalServerError"}}),
    "tgi": event({"error": "out of memory", "error_type": "generation"}),
    "llama.cpp": event({"error": {"code": 500, "message": "out of memory", "type": "server_error"}}),
    "ollama": event({"error": {"message": "out of memory", "type": "api_error", "param": None, "code": None}}),
    "transformers": event({"error": "out of memory"}),
}


@pytest.mark.parametrize("server", BREAKS)
async def test_an_error_in_the_middle_is_read_in_each_server_s_shape(server: str):
    with pytest.raises(EngineFailed, match="out of memory"):
        await answer(Reply([of_chat({"content": "Hel"}), BREAKS[server]]), server)


async def test_an_error_that_is_no_data_of_the_stream_is_still_an_end_in_the_middle():
    """As llama.cpp's server wrote them for long: a line of its own, and no more."""
    with pytest.raises(EngineFailed, match="in the middle"):
        await answer(Reply([of_chat({"content": "Hel"}), b'error: {"code": 500, "message": "no"}\n\n']), "llama.cpp")
