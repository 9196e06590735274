"""OpenAI's wire, from requests and back to events and errors."""

from typing import Any

import msgspec
import pytest

from app.engine.remote.chunks import Chunk
from app.engine.remote.wire import request_body
from app.errors import (
    AppError,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    PiiBlocked,
    QuotaExceeded,
    RateLimited,
    ServiceUnavailable,
    Unauthorized,
)
from app.events import CacheStatus, Delta, ToolCallDelta
from app.langchain.service_engine import ServiceEngine
from app.langchain.service_wire import StreamReader, error_from
from app.requests import RESOLVABLE, GenerationRequest
from app.types import FinishReason, Grammar, Message, Role, SamplingParams, Tenant, Tool, ToolCall, ToolChoice, Usage

BASE: dict[str, Any] = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}


def chunk_of(fields: dict[str, Any]) -> Chunk:
    return msgspec.convert(fields, Chunk)


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"id": "1", "tenant": Tenant.program(), "unset": RESOLVABLE, **fields})


def test_what_is_left_open_is_not_sent():
    """The service then decides; what is given is sent, even where it is the neutral value."""
    body = request_body(request(text="Once"), "m")
    given = request_body(request(text="Once", unset=RESOLVABLE - {"temperature", "max_tokens"}), "m")

    assert {**BASE, "prompt": "Once"} == body
    assert {**BASE, "prompt": "Once", "temperature": 0.0, "max_tokens": 1} == given


def test_every_sampling_parameter_has_its_field():
    sampling = SamplingParams(
        max_tokens=5,
        stop=("a", "b"),
        seed=3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((7, 1.5),),
        logprobs=2,
        stop_token_ids=(9,),
        ignore_eos=True,
    )

    text = request_body(request(text="x", sampling=sampling), "m")
    chat = request_body(request(messages=(Message(Role.USER, "x"),), sampling=sampling), "m")

    fields = {"stop": ["a", "b"], "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    fields |= {"logit_bias": {"7": 1.5}, "stop_token_ids": [9], "ignore_eos": True}
    assert {**BASE, "prompt": "x", **fields, "logprobs": 2} == text
    assert {"logprobs": True, "top_logprobs": 2} == {name: chat[name] for name in ("logprobs", "top_logprobs")}
    assert fields.items() <= chat.items()


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("json_schema", '{"type": "object"}'), {"json": {"type": "object"}}),
        (Grammar("regex", "a+"), {"regex": "a+"}),
        (Grammar("lark", 'start: "a"'), {"grammar": 'start: "a"'}),
    ],
)
def test_a_grammar_is_sent_as_structured_output(grammar: Grammar, expected: dict[str, Any]):
    body = request_body(request(text="x", sampling=SamplingParams(grammar=grammar)), "m")

    assert expected == body["structured_outputs"]


def test_a_conversation_with_tools_keeps_its_calls_results_names_and_reasoning():
    messages = (
        Message(Role.SYSTEM, "s"),
        Message(Role.USER, "u", name="ann"),
        Message(Role.ASSISTANT, "", (ToolCall("1", "add", '{"a": 1}'),), reasoning="Hm."),
        Message(Role.TOOL, "2", tool_call_id="1", name="add"),
    )
    tool = Tool("add", "Adds.", '{"type": "object"}', strict=True)

    body = request_body(
        request(
            messages=messages,
            tools=(tool,),
            tool_choice=ToolChoice("required", "add"),
            parallel_tool_calls=False,
            template_kwargs=(("enable_thinking", False),),
        ),
        "m",
    )

    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "ann"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"},
    ] == body["messages"]
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
    assert [{"type": "function", "function": function}] == body["tools"]
    assert {"type": "function", "function": {"name": "add"}} == body["tool_choice"]
    assert (False, {"enable_thinking": False}) == (body["parallel_tool_calls"], body["chat_template_kwargs"])


def test_a_streams_chunks_are_the_events_that_they_came_from():
    reader = StreamReader(cached=True)
    part = {"index": 0, "id": "1", "function": {"name": "add", "arguments": "{"}}
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    usage["completion_tokens_details"] = {"reasoning_tokens": 1}
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "Hm."}}]},
        {"choices": [{"delta": {"content": "So", "tool_calls": [part]}}]},
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": usage},
    ]

    deltas = [delta for chunk in chunks for delta in reader.read(chunk_of(chunk))]
    finished = reader.finish()

    assert [
        Delta(reasoning="Hm."),
        Delta(text="So", tool_calls=(ToolCallDelta(id="1", name="add", arguments="{"),)),
    ] == deltas
    assert (FinishReason.TOOL_CALLS, Usage(5, 3, 2), CacheStatus.HIT) == (
        finished.finish_reason,
        finished.usage,
        finished.cache,
    )
    assert 1 == finished.samples[0].reasoning_tokens


def test_log_probabilities_of_both_routes_are_read():
    top = {"token": "b", "bytes": [98], "logprob": -2.0}
    chat = {"content": [{"token": "a", "bytes": [97], "logprob": -1.0, "top_logprobs": [top]}]}
    text = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -2.0}]}

    (of_chat,) = StreamReader(cached=False).read(chunk_of({"choices": [{"delta": {"content": "a"}, "logprobs": chat}]}))
    (of_text,) = StreamReader(cached=False).read(chunk_of({"choices": [{"text": "a", "logprobs": text}]}))

    assert of_chat == of_text
    assert ("a", b"a", -1.0, "b", -2.0) == (
        of_text.text,
        of_text.logprobs[0].raw,
        of_text.logprobs[0].logprob,
        of_text.logprobs[0].top[0].text,
        of_text.logprobs[0].top[0].logprob,
    )


def test_a_stream_that_breaks_off_is_an_error_and_no_answer():
    with pytest.raises(ServiceUnavailable, match="before its answer"):
        StreamReader(cached=False).finish()


def test_an_error_in_a_stream_is_raised_as_it_would_have_been_before():
    error = {"message": "too slow", "code": "deadline_exceeded", "param": None, "type": "server_error"}

    with pytest.raises(DeadlineExceeded, match="too slow"):
        list(StreamReader(cached=False).read(chunk_of({"error": error})))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "invalid_request_error", InvalidRequest),
        (400, "context_length_exceeded", InvalidRequest),
        (400, "pii_blocked", PiiBlocked),
        (401, "invalid_api_key", Unauthorized),
        (403, "permission_denied", Forbidden),
        (404, "model_not_found", ModelNotFound),
        (429, "rate_limit_exceeded", RateLimited),
        (429, "insufficient_quota", QuotaExceeded),
        (503, "service_unavailable", ServiceUnavailable),
        (504, "deadline_exceeded", DeadlineExceeded),
        (500, "internal_server_error", InternalError),
    ],
)
def test_an_error_is_of_the_class_that_a_model_in_process_raises(status: int, code: str, expected: type[AppError]):
    """With the service's message, the field, and when to try again."""
    body = {"error": {"message": "why", "type": "t", "param": "stop", "code": code}}

    error = error_from(status, body, {"retry-after": "7"})

    assert (expected, "why", 7.0) == (type(error), error.message, error.retry_after)
    assert "stop" == error.details["errors"][0]["field"]


def test_an_answer_that_is_none_of_the_service_is_said_to_be_so():
    assert "status 502" in error_from(502, None, {}).message


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused(address: str):
    with pytest.raises(ValueError, match="base_url"):
        ServiceEngine(address, None, model=None, timeout_seconds=1)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ключ"])
def test_a_key_that_cannot_be_one_is_refused_without_being_repeated(key: str):
    with pytest.raises(ValueError, match="key must be") as raised:
        ServiceEngine("http://host/v1/", key, model=None, timeout_seconds=1)

    assert key not in str(raised.value)
