"""Tools in requests of both dialects: what the service is asked, what is refused, and what comes back accepted."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI

from app.events import Delta, ToolCallDelta
from app.types import FinishReason, Message, Role, Tool, ToolCall, ToolChoice
from tests.web.harness import CHAT, KEY, MODEL, RecordingEngine, ScriptedService, Step, Web, frames, make_web

CHATS, NATIVE = "/v1/chat/completions", "/v1/chat"
PATHS = (CHATS, NATIVE)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = (Tool("add", "Adds.", json.dumps(SCHEMA)), Tool("now", None, '{"type": "object", "properties": {}}'))
CALLS: list[Step] = [
    Delta(reasoning="Hm.", tokens=1),
    Delta(tool_calls=(ToolCallDelta(id="call_1", name="add", arguments='{"a"'),), tokens=1),
    Delta(tool_calls=(ToolCallDelta(arguments=": 1}"),), tokens=1),
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.fixture
async def calling() -> Web:
    """An application whose every completion thinks and calls."""
    return await make_web(ScriptedService(CALLS, finish_reason=FinishReason.TOOL_CALLS, reasoning_tokens=1))


@pytest.fixture
async def caller(calling: Web) -> AsyncIterator[httpx.AsyncClient]:
    async with calling.client() as client:
        yield client


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        (None, TOOLS, ToolChoice("auto")),
        ("auto", TOOLS, ToolChoice("auto")),
        ("none", (), ToolChoice()),
        ("required", TOOLS, ToolChoice("required")),
        (named("now"), TOOLS, ToolChoice("required", "now")),
        ({"type": "function", "name": "now"}, TOOLS, ToolChoice("required", "now")),
        (allowed("auto", "now"), TOOLS[1:], ToolChoice("auto")),
        (allowed("required", "now", "add"), TOOLS, ToolChoice("required")),
    ],
)
async def test_a_choice_says_what_the_model_is_told_of_and_must_call(web, client, path, choice, tools, expected):
    """With `none` it is not told of tools at all."""
    reply = await client.post(path, json={**CHAT, "tools": [ADD, NOW], "tool_choice": choice})

    assert 200 == reply.status_code, reply.text
    (request,) = web.service.requests
    assert (tools, expected) == (request.tools, request.tool_choice)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", [{}, {"tools": None}, {"tools": []}, {"tools": [], "tool_choice": "auto"}])
@pytest.mark.parametrize("parallel", [None, True, False])
async def test_a_request_without_tools_is_an_ordinary_one(web, client, path, given, parallel):
    """Clients send the fields whether they have tools or not."""
    reply = await client.post(path, json={**CHAT, **given, "parallel_tool_calls": parallel})

    assert 200 == reply.status_code, reply.text
    assert ((), ToolChoice()) == (web.service.requests[0].tools, web.service.requests[0].tool_choice)


@pytest.mark.parametrize("path", PATHS)
async def test_one_call_at_most_may_be_asked_for(web, client, path):
    for parallel in (None, True, False):
        await client.post(path, json={**CHAT, "tools": [ADD], "parallel_tool_calls": parallel})

    assert [True, True, False] == [request.parallel_tool_calls for request in web.service.requests]


@pytest.mark.parametrize("choice", [None, "auto", "none", {"name": "add"}])
async def test_the_older_fields_mean_the_same(web, client, choice):
    """One call at most, which is all that the older response has room for."""
    functions = [ADD["function"], NOW["function"]]
    reply = await client.post(CHATS, json={**CHAT, "functions": functions, "function_call": choice})

    assert 200 == reply.status_code, reply.text
    (request,) = web.service.requests
    expected = ToolChoice("required", "add") if isinstance(choice, dict) else ToolChoice()
    assert ((TOOLS, False) if choice != "none" else ((), True)) == (request.tools, request.parallel_tool_calls)
    assert expected == request.tool_choice


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [ADD, ADD]}, "tools.1.function.name"),
        ({"tools": [ADD] * 129}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**ADD, "more": 1}]}, "tools.0.more"),
        (tool(name=""), "tools.0.function.name"),
        (tool(name="a b"), "tools.0.function.name"),
        (tool(name="x" * 129), "tools.0.function.name"),
        (tool(strict="yes"), "tools.0.function.strict"),
        (tool(description=1), "tools.0.function.description"),
        (tool(parameters=[]), "tools.0.function.parameters"),
        (tool(parameters={"type": "string"}), "tools.0.function.parameters"),
        (tool(parameters={"properties": []}), "tools.0.function.parameters"),
        (tool(parameters={"properties": {"a": {"type": "text"}}}), "tools.0.function.parameters"),
        (tool(parameters={"properties": {"a": 1}}), "tools.0.function.parameters"),
        (tool(parameters={"required": "a"}), "tools.0.function.parameters"),
        (tool(parameters={"anyOf": {}}), "tools.0.function.parameters"),
        (tool(parameters={"properties": {"a": {"items": [{"enum": 1}]}}}), "tools.0.function.parameters"),
        (tool(description="x" * 262_145), "tools"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "custom", "custom": {"name": "add"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": named("now")}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": allowed("auto")}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": allowed("auto", "add", "now")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("add")}, "tool_choice"),
        ({"tools": [ADD], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
async def test_what_is_wrong_with_tools_is_refused_by_name(web, client, path, given, param):
    reply = await client.post(path, json={**CHAT, **given})

    assert 400 == reply.status_code, reply.text
    body = reply.json()
    field = body["error"]["param"] if path == CHATS else body["details"]["errors"][0]["field"]
    assert param == field
    assert [] == web.service.requests


def conversation(call_id: str, name: str = "add", result_id: str | None = None) -> list[dict[str, Any]]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": call_id if result_id is None else result_id, "content": "1"}
    return [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}, result]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (conversation("anna@example.com", result_id="1"), "messages.1.tool_calls.0.id"),
        (conversation("call Anna", result_id="1"), "messages.1.tool_calls.0.id"),
        (conversation("1", result_id="anna@example.com"), "messages.2.tool_call_id"),
        (conversation("1", result_id=""), "messages.2.tool_call_id"),
        (conversation("1", result_id="1\n"), "messages.2.tool_call_id"),
        (conversation("1", name="anna@example.com"), "messages.1.tool_calls.0.function.name"),
        (conversation("1", name="call Anna"), "messages.1.tool_calls.0.function.name"),
        (conversation("1", name="a" * 129), "messages.1.tool_calls.0.function.name"),
    ],
)
async def test_ids_and_names_of_calls_hold_no_address_and_no_sentence(web, client, path, messages, field):
    """The filters of personal data leave both alone."""
    reply = await client.post(path, json={**CHAT, "messages": messages})

    assert 400 == reply.status_code, reply.text
    body = reply.json()
    assert field == (body["error"]["param"] if path == CHATS else body["details"]["errors"][0]["field"])
    assert "nna" not in reply.text
    assert [] == web.service.requests


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "call_id",
    [
        "call_0123456789abcdefABCDEF01",
        "abcdefgh1",
        "chatcmpl-tool-0123456789abcdef",
        "toolu_01A09q90qw90lq917835lq9",
        "functions.add:0",
        "call_1|fc_1",
        "call_1__thought__Cs4BAdHtim9/+A==",
        "0",
    ],
)
async def test_ids_of_every_service_are_taken(web, client, path, call_id):
    """A conversation may have begun elsewhere."""
    reply = await client.post(path, json={**CHAT, "messages": conversation(call_id)})

    assert 200 == reply.status_code, reply.text
    _, called, result = web.service.requests[-1].messages
    assert (call_id, call_id) == (called.tool_calls[0].id, result.tool_call_id)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"functions": [ADD["function"]], "tools": [ADD]}, "functions"),
        ({"functions": [ADD["function"]] * 2}, "functions.1.name"),
        ({"functions": [ADD["function"]], "function_call": {"name": "now"}}, "function_call"),
        ({"functions": [ADD["function"]], "function_call": "required"}, "function_call"),
        ({"functions": [ADD]}, "functions.0.name"),
    ],
)
async def test_what_is_wrong_with_functions_is_refused_by_name(client, given, param):
    reply = await client.post(CHATS, json={**CHAT, **given})

    assert (400, param) == (reply.status_code, reply.json()["error"]["param"]), reply.text


async def test_a_type_of_tool_that_nobody_serves_is_named(client):
    reply = await client.post(CHATS, json={**CHAT, "tools": [{"type": "code_interpreter"}]})

    assert "code_interpreter tools are not supported" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_hints_and_empty_fields_of_a_tool_change_nothing(web, client, path):
    hinted = {**ADD, "cache_control": {"type": "ephemeral"}, "extra": None}
    reply = await client.post(path, json={**CHAT, "tools": [hinted]})

    assert 200 == reply.status_code, reply.text
    assert TOOLS[:1] == web.service.requests[0].tools


async def test_a_schema_goes_to_the_model_as_it_was_written(web, client):
    """The order of its keys is the client's own, and a number keeps its size."""
    schema = {"required": ["z", "a"], "properties": {"z": {"maximum": 1e30}, "a": {}}, "type": "object", "$defs": {}}
    await client.post(CHATS, json={**CHAT, **tool(parameters=schema, strict=True)})

    (sent,) = web.service.requests[0].tools
    assert (json.dumps(schema), True) == (sent.parameters, sent.strict)


async def test_an_openai_client_gets_message_and_finish_reason_of_a_call(caller):
    reply = (await caller.post(CHATS, json={**CHAT, "tools": [ADD]})).json()

    (choice,) = reply["choices"]
    thought = {"reasoning_content": "Hm.", "reasoning": "Hm."}
    message = {"role": "assistant", "content": None, "refusal": None, **thought, "tool_calls": [CALL]}
    assert (message, "tool_calls") == (choice["message"], choice["finish_reason"])
    assert {"reasoning_tokens": 1} == reply["usage"]["completion_tokens_details"]


async def test_openais_client_goes_a_round_with_a_tool(calling, caller):
    """Whole and streamed; what it accumulates is what it sends back."""
    openai = AsyncOpenAI(api_key=KEY, base_url="http://test/v1", http_client=caller)
    question: list[Any] = [{"role": "user", "content": "1?"}]
    fields: dict[str, Any] = {"model": MODEL, "tools": [ADD]}

    whole = await openai.chat.completions.create(messages=question, **fields)
    async with openai.chat.completions.stream(messages=question, **fields) as stream:
        streamed = await stream.get_final_completion()
    messages = [*question, streamed.choices[0].message, {"role": "tool", "tool_call_id": "call_1", "content": "1"}]
    await openai.chat.completions.create(messages=messages, **fields)

    for completion in (whole, streamed):
        (choice,) = completion.choices
        calls: list[Any] = [*(choice.message.tool_calls or [])]
        called = [(call.id, call.function.name, call.function.arguments) for call in calls]
        assert [("call_1", "add", '{"a": 1}')] == called
        assert ("tool_calls", "Hm.") == (choice.finish_reason, (choice.message.model_extra or {})["reasoning_content"])
    assert ToolCall("call_1", "add", '{"a": 1}') == calling.service.requests[-1].messages[1].tool_calls[0]


async def test_langchains_client_goes_a_round_with_a_tool(calling, caller):
    settings: dict[str, Any] = {"model": MODEL, "api_key": KEY, "base_url": "http://test/v1"}
    chat = ChatOpenAI(**settings, http_async_client=caller)
    bound = chat.bind_tools([ADD])

    whole = await bound.ainvoke("1?")
    streamed: Any = None
    async for chunk in bound.astream("1?"):
        streamed = chunk if streamed is None else streamed + chunk
    await bound.ainvoke([HumanMessage("1?"), streamed, ToolMessage("1", tool_call_id="call_1")])

    for message in (whole, streamed):
        assert [("call_1", "add", {"a": 1})] == [
            (each["id"], each["name"], each["args"]) for each in message.tool_calls
        ]
    roles = [message.role for message in calling.service.requests[-1].messages]
    assert [Role.USER, Role.ASSISTANT, Role.TOOL] == roles


async def test_a_native_client_gets_the_same(caller):
    """In `message`, and in each of `completions` where there are several."""
    reply = (await caller.post(NATIVE, json={**CHAT, "tools": [ADD], "n": 2})).json()

    reasoned = {"reasoning_content": "Hm.", "tool_calls": [CALL]}
    assert {"role": "assistant", "content": "", **reasoned} == reply["message"]
    assert [{"text": "", "finish_reason": "tool_calls", **reasoned}] * 2 == reply["completions"]
    assert ("tool_calls", {"reasoning_tokens": 2}) == (
        reply["finish_reason"],
        reply["usage"]["completion_tokens_details"],
    )


async def test_a_native_stream_has_thoughts_and_calls_in_its_deltas(caller):
    reply = await caller.post(NATIVE, json={**CHAT, "tools": [ADD], "stream": True})

    *deltas, (name, done) = [(name, json.loads(data)) for name, data in frames(reply.text)]
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}
    assert [
        ("delta", {"content": "", "reasoning_content": "Hm."}),
        ("delta", {"content": "", "tool_calls": [first]}),
        ("delta", {"content": "", "tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
    ] == deltas
    assert ("done", "tool_calls") == (name, done["finish_reason"])


@pytest.mark.parametrize("path", PATHS)
async def test_a_message_of_ours_comes_back_with_its_result(calling, caller, path):
    """As clients do it: our own message object, then a message for each call."""
    reply = (await caller.post(path, json={**CHAT, "tools": [ADD]})).json()
    ours = reply["choices"][0]["message"] if path == CHATS else reply["message"]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "2"}

    again = await caller.post(path, json={"messages": [*CHAT["messages"], ours, result], "tools": [ADD]})

    assert 200 == again.status_code, again.text
    call = ToolCall("call_1", "add", '{"a": 1}')
    assert (
        Message(Role.ASSISTANT, "", (call,), reasoning="Hm."),
        Message(Role.TOOL, "2", tool_call_id="call_1"),
    ) == calling.service.requests[-1].messages[1:]


@pytest.mark.parametrize(
    "message",
    [
        {
            "content": "Hi",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"content": "Hi", "annotations": [], "tool_calls": []},
        {
            "content": "Hi",
            "reasoning_details": [{"text": "x"}],
            "thinking_blocks": [{}],
            "provider_specific_fields": {"a": 1},
        },
        {"content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"content": [{"type": "refusal", "refusal": "Hi"}]},
        {"content": None, "refusal": "Hi"},
    ],
)
async def test_an_earlier_answer_may_come_as_any_client_writes_it(web, client, message):
    reply = await client.post(CHATS, json={"messages": [{"role": "assistant", **message}, *CHAT["messages"]]})

    assert 200 == reply.status_code, reply.text
    assert Message(Role.ASSISTANT, "Hi") == web.service.requests[0].messages[0]


@pytest.mark.parametrize("message", [{"content": None}, {}, {"content": ""}, {"content": []}])
async def test_an_earlier_answer_may_be_empty(web, client, message):
    reply = await client.post(CHATS, json={"messages": [{"role": "assistant", **message}, *CHAT["messages"]]})

    assert 200 == reply.status_code, reply.text
    assert Message(Role.ASSISTANT, "") == web.service.requests[0].messages[0]


async def test_calls_of_other_services_are_understood(web, client):
    """Arguments as an object, no id, no type, a position from a stream; and the older form."""
    called = {"function": {"name": "add", "arguments": {"a": 1}}, "index": 0, "id": None}
    older = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a":1}'}}
    messages = [
        {"role": "assistant", "tool_calls": [called]},
        older,
        {"role": "function", "name": "add", "content": "2"},
    ]

    reply = await client.post(CHATS, json={"messages": messages})

    assert 200 == reply.status_code, reply.text
    assert (
        Message(Role.ASSISTANT, "", (ToolCall("", "add", '{"a":1}'),)),
        Message(Role.ASSISTANT, "", (ToolCall("", "add", '{"a":1}'),)),
        Message(Role.TOOL, "2", name="add"),
    ) == web.service.requests[0].messages


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_what_was_thought_earlier_comes_back_under_either_name(web, client, name):
    thought = {"role": "assistant", "content": "Hi", name: "Hm."}
    await client.post(CHATS, json={"messages": [thought, {"role": "user", "content": "x", name: "of no meaning"}]})

    assert [None, "Hm."] == sorted((each.reasoning for each in web.service.requests[0].messages), key=bool)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "tool", "content": "x"}], "messages.0"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages.0"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages.0"),
        ([{"role": "assistant", "content": ""}, *CHAT["messages"]], "messages.0"),
        ([{"role": "assistant", "content": "x", "tool_calls": [CALL]}], "messages"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role"),
    ],
)
async def test_what_a_native_message_cannot_hold_is_refused_by_its_path(client, messages, field):
    reply = await client.post(NATIVE, json={"messages": messages})

    assert (400, field) == (reply.status_code, reply.json()["details"]["errors"][0]["field"])


async def test_a_message_that_calls_cannot_be_continued(client):
    messages = [{"role": "assistant", "content": "x", "tool_calls": [CALL]}]
    reply = await client.post(CHATS, json={"messages": messages, "continue_final_message": True})

    assert (400, "continue_final_message") == (reply.status_code, reply.json()["error"]["param"])


@pytest.mark.parametrize("path", PATHS)
async def test_template_variables_reach_the_service_sorted_and_without_null(web, client, path):
    given = {"thinking_budget": 5, "enable_thinking": False, "style": None}
    await client.post(path, json={**CHAT, "chat_template_kwargs": given, "reasoning_effort": "high"})

    (request,) = web.service.requests
    assert ((("enable_thinking", False), ("thinking_budget", 5)), "high") == (
        request.template_kwargs,
        request.reasoning_effort,
    )


async def test_thinking_may_be_switched_by_its_own_field(web, client):
    await client.post(CHATS, json={**CHAT, "enable_thinking": False})

    assert (("enable_thinking", False),) == web.service.requests[0].template_kwargs


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"chat_template_kwargs": {"style": "x"}}, "chat_template_kwargs.style"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "chat_template_kwargs"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"enable_thinking": True}, "chat_template_kwargs"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ],
)
async def test_only_variables_that_the_models_template_reads_may_be_set(given, param):
    """Never a template; a variable of another name is refused by that name, and the known ones are listed."""
    web = await make_web(engines={MODEL: RecordingEngine()})
    async with web.client() as client:
        reply = await client.post(CHATS, json={**CHAT, **given})
        neutral = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "none"}
        plain = await client.post(CHATS, json={**CHAT, **neutral})

    assert 400 == reply.status_code, reply.text
    assert reply.json()["error"]["param"].startswith(param)
    assert 200 == plain.status_code, plain.text


async def test_a_session_shows_calls_and_results():
    """In the shape of messages, so that they could be sent again as they are."""
    engine = RecordingEngine()
    web = await make_web(engines={MODEL: engine})
    result = {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "add"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    async with web.client() as client:
        question = {"role": "user", "content": "What is 1 + 1?"}
        first = await client.post(NATIVE, json={"messages": [question, called, result], "session_id": "s"})
        session = (await client.get("/v1/sessions/s")).json()

        assert 200 == first.status_code, first.text
        answer = {"role": "assistant", "content": first.json()["message"]["content"]}
        assert [question, called, result, answer] == session["messages"]
        again = await client.post(NATIVE, json={"messages": [*session["messages"], question]})
        assert 200 == again.status_code, again.text
