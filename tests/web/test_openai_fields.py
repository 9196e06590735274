"""Every field of the installed `openai` package's request types is honoured, or refused by its name.

The types are walked, so a newer package with a new field fails here and not at a user's.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from msgspec import structs
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_content_part_text_param import ChatCompletionContentPartTextParam
from openai.types.chat.chat_completion_message_param import ChatCompletionMessageParam
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from app.requests import GenerationRequest, Origin
from app.types import Grammar, Message, Role, Tool, ToolCall
from app.web.openai.chat import ChatCompletionRequest
from app.web.openai.completions import CompletionRequest
from tests.web.harness import CHAT, GENERATE, MODEL

# What it runs again and again is measured by other tests.
pytestmark = pytest.mark.no_cover

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
BODIES = {CHATS: CHAT, TEXTS: GENERATE}
TYPES = {
    CHATS: (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming),
    TEXTS: (text_params.CompletionCreateParamsNonStreaming, text_params.CompletionCreateParamsStreaming),
}

Seen = Callable[[GenerationRequest], Any]
"""The part of the generation request that comes from the field."""


def sampled(name: str) -> Seen:
    """Return a parameter's value; None if the request leaves it to the service."""
    return lambda request: None if name in request.unset else getattr(request.sampling, name)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
ADD = Tool("add", "Adds.", json.dumps(SCHEMA))

DRAWN: dict[str, tuple[Any, Any, Seen]] = {
    "model": (MODEL, MODEL, lambda request: request.model),
    "max_tokens": (7, 7, sampled("max_tokens")),
    "temperature": (0.25, 0.25, sampled("temperature")),
    "top_p": (0.5, 0.5, sampled("top_p")),
    "n": (3, 3, lambda request: request.n),
    "stop": (["A", "B"], ("A", "B"), sampled("stop")),
    "seed": (-1, 2**63 - 1, sampled("seed")),
    "presence_penalty": (1.5, 1.5, sampled("presence_penalty")),
    "frequency_penalty": (-0.5, -0.5, sampled("frequency_penalty")),
    "logit_bias": ({"5": -100, "3": 1}, ((3, 1.0), (5, -100.0)), sampled("logit_bias")),
}
EXTRAS: dict[str, tuple[Any, Any, Seen]] = {
    "top_k": (-1, 0, sampled("top_k")),
    "min_p": (0.1, 0.1, sampled("min_p")),
    "repetition_penalty": (1.2, 1.2, sampled("repetition_penalty")),
    "ignore_eos": (True, True, sampled("ignore_eos")),
    "min_tokens": (3, 3, sampled("min_tokens")),
    "stop_token_ids": ([9, 2, 9], (2, 9), sampled("stop_token_ids")),
    "priority": (3, 3, lambda request: request.priority),
    "truncation": ("auto", 0, lambda request: request.truncate_prompt),
    "truncate_prompt_tokens": (50, 50, lambda request: request.truncate_prompt),
    "prompt_logprobs": (4, 4, sampled("prompt_logprobs")),
    "structured_outputs": ({"regex": "a+"}, Grammar("regex", "a+"), sampled("grammar")),
    "guided_json": ({"type": "null"}, Grammar("json_schema", '{"type":"null"}'), sampled("grammar")),
    "guided_regex": ("a+", Grammar("regex", "a+"), sampled("grammar")),
    "guided_choice": (["a", 'é"'], Grammar("lark", 'start: "a" | "é\\""'), sampled("grammar")),
    "guided_grammar": ('start: "a"', Grammar("lark", 'start: "a"'), sampled("grammar")),
}
"""vLLM's, and `truncation` of OpenAI's responses."""
HONOURED: dict[str, dict[str, tuple[Any, Any, Seen]]] = {
    CHATS: DRAWN
    | {
        "messages": (
            [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            (Message(Role.SYSTEM, "a\nb"),),
            lambda request: request.messages,
        ),
        "max_completion_tokens": (9, 9, sampled("max_tokens")),
        "logprobs": (True, 0, sampled("logprobs")),
        "tools": ([TOOL], (ADD,), lambda request: request.tools),
        "functions": ([TOOL["function"]], (ADD,), lambda request: request.tools),
        "reasoning_effort": ("low", "low", lambda request: request.reasoning_effort),
        "response_format": (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}, "strict": True}},
            Grammar("json_schema", '{"type":"null"}'),
            sampled("grammar"),
        ),
    },
    TEXTS: DRAWN
    | {
        "prompt": ([1, 2, 3], (1, 2, 3), lambda request: request.prompt_ids),
        "logprobs": (5, 5, sampled("logprobs")),
    },
}
"""Fields that change the generation request: a value, what it is translated to, and where."""

HINTS: dict[str, dict[str, list[Any]]] = {
    CHATS: {
        "prediction": [{"type": "content", "content": "x"}],
        "prompt_cache_key": ["k"],
        "prompt_cache_options": [{"mode": "explicit"}],
        "prompt_cache_retention": ["in_memory", "24h"],
        "service_tier": ["auto", "default", "flex", "scale", "priority"],
        "store": [True, False],
        "verbosity": ["low", "medium", "high"],
    },
    TEXTS: {},
}
"""Fields that may have any value of their own API and change no completion; those that the types list are added."""
NEUTRAL: dict[str, tuple[list[Any], Any]] = {
    "cache_prompt": ([True], False),
    "detokenize": ([True], False),
    "early_stopping": ([False], True),
    "include_stop_str_in_output": ([False], True),
    "length_penalty": ([1, 1.0], 2),
    "mirostat": ([0], 2),
    "repeat_penalty": ([1, 1.0], 1.1),
    "return_token_ids": ([False], True),
    "return_tokens_as_token_ids": ([False], True),
    "skip_special_tokens": ([True], False),
    "spaces_between_special_tokens": ([True, False], "x"),
    "tfs_z": ([1], 0.5),
    "truncation_side": (["left"], "right"),
    "typical_p": ([1.0], 0.5),
    "use_beam_search": ([False], True),
    "metadata": ([{}, {"run": "7"}], {"run": 7}),
    "best_of": ([1], 2),
    "truncation": (["disabled"], "middle"),
}
"""Other servers' fields on both routes: the values that change nothing, and one that is refused by name."""
ELSEWHERE = {
    CHATS: {"stream", "stream_options", "top_logprobs", "metadata", "user", "safety_identifier"}
    | {"tool_choice", "parallel_tool_calls", "function_call"},
    TEXTS: {"stream", "stream_options", "echo", "user", "best_of"},
}
"""Fields that are honoured otherwise; each has a test of its own in this folder."""

REFUSED: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    CHATS: {
        "audio": ([], [{"format": "mp3", "voice": "alloy"}]),
        "modalities": ([["text"]], [["text", "audio"], ["audio"]]),
        "moderation": ([], [{"model": "m"}]),
        "web_search_options": ([], [{}]),
    },
    TEXTS: {"suffix": ([""], ["x"])},
}
"""Fields that cannot be honoured: the values that change nothing, and others; those of the types are added."""


def literals(hint: Any) -> Iterator[Any]:
    """Yield the values that a type lists by name."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from literals(part)


def fields(path: str) -> dict[str, Any]:
    """Return the package's own field names and types of a route."""
    return {name: hint for kind in TYPES[path] for name, hint in get_type_hints(kind).items()}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_of_the_package_is_known_here(path):
    """A field in no table is one that nobody has thought about."""
    assert set(fields(path)) == HONOURED[path].keys() | ELSEWHERE[path] | REFUSED[path].keys() | HINTS[path].keys()


def test_the_table_for_users_names_every_field():
    """In docs/openai.md, with our and vLLM's own."""
    words = set(re.findall(r"`([a-z_]+)`", (Path(__file__).parents[2] / "docs" / "openai.md").read_text()))
    ours = {name for model in (ChatCompletionRequest, CompletionRequest) for name in model.model_fields}

    assert set() == (fields(CHATS).keys() | fields(TEXTS).keys() | ours) - words


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in BODIES for name in {**HONOURED[path], **EXTRAS}], ids=lambda each: each
)
async def test_a_field_that_is_honoured_reaches_the_service(web, client, path, name):
    value, expected, seen = {**HONOURED[path], **EXTRAS}[name]

    reply = await client.post(path, json={**BODIES[path], name: value})

    assert 200 == reply.status_code, reply.text
    assert expected == seen(web.service.requests[0])


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in BODIES for name in REFUSED[path]])
async def test_a_field_that_cannot_be_honoured_is_refused_by_name(web, client, path, name):
    """Every value that means something, those that the package's types list among them; null and defaults pass."""
    neutral, meant = REFUSED[path][name]
    others = [value for value in literals(fields(path)[name]) if value not in neutral]
    assert meant + others

    for value in [None, *neutral]:
        assert 200 == (await client.post(path, json={**BODIES[path], name: value})).status_code
    before = len(web.service.requests)
    for value in meant + [value for value in others if isinstance(value, str)]:
        reply = await client.post(path, json={**BODIES[path], name: value})
        assert (400, "invalid_request_error", name) == (
            reply.status_code,
            reply.json()["error"]["type"],
            reply.json()["error"]["param"],
        )
    assert before == len(web.service.requests)


def unnamed(request: GenerationRequest) -> GenerationRequest:
    """Return a request without what is new in every one."""
    return structs.replace(request, id="", origin=Origin())


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in BODIES for name in HINTS[CHATS]])
async def test_a_hint_is_accepted_and_changes_nothing(web, client, path, name):
    """Every value that the package's types list; completions take the same hints, but not for a prediction."""
    listed = [value for value in literals(fields(CHATS)[name]) if isinstance(value, str)]
    values = [None, *HINTS[CHATS][name], *listed] if (path, name) != (TEXTS, "prediction") else [None]

    await client.post(path, json=BODIES[path])
    for value in values:
        reply = await client.post(path, json={**BODIES[path], name: value})
        assert 200 == reply.status_code, reply.text
    assert {unnamed(web.service.requests[0])} == {unnamed(each) for each in web.service.requests}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in BODIES for name in NEUTRAL])
async def test_a_value_that_changes_nothing_is_accepted_and_another_refused_by_name(web, client, path, name):
    neutral, meant = NEUTRAL[name]

    await client.post(path, json=BODIES[path])
    for value in [None, *neutral]:
        reply = await client.post(path, json={**BODIES[path], name: value})
        assert 200 == reply.status_code, reply.text
    refused = await client.post(path, json={**BODIES[path], name: meant})

    assert (400, name) == (refused.status_code, refused.json()["error"]["param"]), refused.text
    assert {unnamed(web.service.requests[0])} == {unnamed(each) for each in web.service.requests}


async def test_special_tokens_are_added_as_the_routes_default_has_it(client):
    """A chat's template writes them itself; a plain prompt gets those of the tokenizer."""
    for path, default in ((CHATS, False), (TEXTS, True)):
        for value, status in ((default, 200), (not default, 400)):
            reply = await client.post(path, json={**BODIES[path], "add_special_tokens": value})
            assert status == reply.status_code, reply.text


@pytest.mark.parametrize("path", BODIES)
async def test_a_field_that_nobody_knows_is_refused_by_name(client, path):
    reply = await client.post(path, json={**BODIES[path], "temprature": 1})

    assert (400, "temprature") == (reply.status_code, reply.json()["error"]["param"])
    assert "temprature: there is no such field" == reply.json()["error"]["message"]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "system": ({"content": "x", "name": "n"}, {}),
    "developer": ({"content": "x", "name": "n"}, {}),
    "user": ({"content": "x", "name": "n"}, {}),
    "assistant": (
        {"content": "x", "name": "n", "refusal": None, "tool_calls": [CALL], "function_call": None},
        {"audio": [{"id": "a"}]},
    ),
    "tool": ({"content": "x", "tool_call_id": "1"}, {}),
    "function": ({"content": "x", "name": "n"}, {}),
}
"""For each role a message that is taken, and the fields that are refused."""


def message_types() -> dict[str, dict[str, Any]]:
    hints = [get_type_hints(kind) for kind in get_args(ChatCompletionMessageParam)]
    return {get_args(hint["role"])[0]: hint for hint in hints}


def test_every_field_of_the_packages_messages_is_known_here():
    for role, hint in message_types().items():
        taken, refused = MESSAGES[role]
        assert set(hint) - {"role"} == (taken.keys() | refused.keys()) - {"role"}, role
    assert message_types().keys() == MESSAGES.keys()
    assert {"type", "text", "prompt_cache_breakpoint"} == set(get_type_hints(ChatCompletionContentPartTextParam))
    assert {"include_usage", "include_obfuscation"} == set(get_type_hints(ChatCompletionStreamOptionsParam))


@pytest.mark.parametrize("role", MESSAGES)
async def test_every_role_is_heard(web, client, role):
    taken, refused = MESSAGES[role]
    expected = {"developer": Role.SYSTEM, "function": Role.TOOL}.get(role) or Role(role)

    reply = await client.post(CHATS, json={"messages": [{"role": role, **taken, **dict.fromkeys(refused)}]})

    assert 200 == reply.status_code, reply.text
    calls = (ToolCall("1", "f", "{}"),) if "tool_calls" in taken else ()
    heard = Message(expected, "x", calls, tool_call_id=taken.get("tool_call_id"), name=taken.get("name"))
    assert (heard,) == web.service.requests[0].messages


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": role, **taken, name: value}, name)
        for role, (taken, refused) in MESSAGES.items()
        for name, values in refused.items()
        for value in values
    ]
    + [
        ({"role": "critic", "content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": "x", "mood": "bad"}, "mood"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}, "tool_calls.0.function.name"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "tool_calls"),
        ({"role": "assistant", "function_call": {"arguments": "{}"}}, "function_call.name"),
        ({"role": "assistant", "reasoning_content": ["x"]}, "reasoning_content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content.0.type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "content.0.text"),
    ],
)
async def test_what_a_message_cannot_hold_is_refused_by_its_path(client, message, param):
    reply = await client.post(CHATS, json={"messages": [{"role": "user", "content": "a"}, message]})

    assert (400, f"messages.1.{param}") == (reply.status_code, reply.json()["error"]["param"])


async def test_a_tools_message_and_no_other_names_its_call(client):
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": "x", "tool_call_id": "1"}):
        reply = await client.post(CHATS, json={"messages": [message]})
        assert (400, "messages.0") == (reply.status_code, reply.json()["error"]["param"])


async def test_what_the_assistant_said_may_come_back_as_it_was_sent(web, client):
    """Clients put our own message object at the end of the conversation."""
    ours = (await client.post(CHATS, json=CHAT)).json()["choices"][0]["message"]

    reply = await client.post(CHATS, json={"messages": [*CHAT["messages"], ours, *CHAT["messages"]]})

    assert 200 == reply.status_code
    assert Message(Role.ASSISTANT, "Hello") == web.service.requests[1].messages[1]


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        (CHATS, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (CHATS, {"top_logprobs": 2}, "top_logprobs"),
        (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHATS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHATS, {"stream": True, "stream_options": {"include_x": True}}, "stream_options.include_x"),
        (
            CHATS,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (CHATS, {"continue_final_message": True}, "continue_final_message"),
        (CHATS, {"add_generation_prompt": False}, "add_generation_prompt"),
        (CHATS, {"reasoning_effort": "huge"}, "reasoning_effort"),
        (CHATS, {"chat_template_kwargs": {"x": {"nested": 1}}}, "chat_template_kwargs"),
        (CHATS, {"chat_template_kwargs": {"x" * 65: 1}}, "chat_template_kwargs"),
        (CHATS, {"chat_template_kwargs": {"x": "y" * 257}}, "chat_template_kwargs"),
        (CHATS, {"chat_template_kwargs": {f"x{number}": 1 for number in range(17)}}, "chat_template_kwargs"),
        (CHATS, {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "enable_thinking"),
        (CHATS, {"metadata": {"a": 1}}, "metadata"),
        (CHATS, {"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        (CHATS, {"metadata": {"a": "x" * 513}}, "metadata"),
        (CHATS, {"service_tier": 1}, "service_tier"),
        (CHATS, {"priority": -1}, "priority"),
        (CHATS, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (CHATS, {"truncate_prompt_tokens": 5, "truncation": "disabled"}, "truncate_prompt_tokens"),
        (CHATS, {"user": 5}, "user"),
        (CHATS, {"session_id": "a b"}, "session_id"),
        (TEXTS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (TEXTS, {"best_of": 2}, "best_of"),
        (TEXTS, {"max_tokens": 0}, "max_tokens"),
        (CHATS, {"max_tokens": 0}, "max_tokens"),
        (CHATS, {"max_completion_tokens": 0, "logprobs": True}, "max_tokens"),
        (TEXTS, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (TEXTS, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (CHATS, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (TEXTS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHATS, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        (TEXTS, {"prompt": None}, "prompt"),
        (TEXTS, {"prompt": []}, "prompt"),
        (TEXTS, {"prompt": ["a", 1]}, "prompt"),
        (TEXTS, {"prompt": [True]}, "prompt"),
        (TEXTS, {"prompt": [-1]}, "prompt"),
        (TEXTS, {"prompt": [[]]}, "prompt"),
        (TEXTS, {"prompt": ["a"] * 65}, "prompt"),
        (TEXTS, {"session_id": "s"}, "session_id"),
    ],
)
async def test_what_contradicts_itself_or_is_out_of_range_is_refused_by_name(web, client, path, given, param):
    reply = await client.post(path, json={**BODIES[path], **given})

    assert (400, param) == (reply.status_code, reply.json()["error"]["param"]), reply.text
    assert [] == web.service.requests


async def test_a_stream_is_never_obfuscated(client):
    """Random padding is refused by name; to want none is fine."""
    plain, padded = [
        await client.post(CHATS, json={**CHAT, "stream": True, "stream_options": {"include_obfuscation": padded}})
        for padded in (False, True)
    ]

    assert (200, 400) == (plain.status_code, padded.status_code)
    assert "stream_options.include_obfuscation" == padded.json()["error"]["param"]


async def test_best_of_may_say_what_n_says(client):
    """So older clients send it; nothing is chosen."""
    for given in ({"best_of": 1}, {"best_of": 2, "n": 2}):
        assert 200 == (await client.post(TEXTS, json={**GENERATE, **given})).status_code


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, (1, 2))]),
        ([[1], [2, 3]], [(None, (1,)), (None, (2, 3))]),
    ],
)
async def test_a_prompt_may_be_a_text_texts_tokens_or_lists_of_tokens(web, client, prompt, expected):
    reply = await client.post(TEXTS, json={"prompt": prompt, "n": 2})

    assert expected == [(request.text, request.prompt_ids) for request in web.service.requests]
    assert list(range(2 * len(expected))) == [choice["index"] for choice in reply.json()["choices"]]


async def test_the_log_distinguishes_end_users_and_names_none(client, log_lines):
    """The same name gives the same mark, and the name itself is not written."""
    for given in ({"user": "jane"}, {"safety_identifier": "jane", "user": "other"}, {"user": "joe"}, {}):
        await client.post(CHATS, json={**CHAT, **given})

    marks = [line.get("end_user") for line in log_lines]
    assert marks[0] == marks[1] != marks[2]
    assert marks[3] is None
    assert "jane" not in str(log_lines)


async def test_metadata_and_the_service_tier_stand_in_the_answer_again(client):
    given = {"metadata": {"run": "7"}, "service_tier": "priority"}

    reply = (await client.post(CHATS, json={**CHAT, **given})).json()
    plain = (await client.post(CHATS, json=CHAT)).json()

    assert ({"run": "7"}, "default") == (reply["metadata"], reply["service_tier"])
    assert not {"metadata", "service_tier"} & plain.keys()
