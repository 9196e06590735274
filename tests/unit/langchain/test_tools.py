"""Tools, calls and reasoning through LangChain's face: its messages keep them, and its methods bind them."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from app.engine.base import Capabilities, EngineInfo
from app.events import Delta, ToolCallDelta
from app.langchain.messages import from_langchain, to_langchain
from app.langchain.models import EngineChat, EnginePipeline
from app.types import FinishReason, Grammar, Message, Role, Tool, ToolCall, ToolChoice
from tests.unit.engine.scripted import ScriptedEngine

CALL = ToolCall("call_1", "add", '{"a": 1}')
CALLING = (
    Delta(reasoning="Let me", tokens=1),
    Delta(reasoning=" add.", tool_calls=(ToolCallDelta(id="call_1", name="add", arguments='{"a"'),), tokens=1),
    Delta(text="So:", tool_calls=(ToolCallDelta(arguments=": 1}"),), tokens=1),
    Delta(tool_calls=(ToolCallDelta(position=1, id="call_2", name="add", arguments="{}"),), tokens=1),
)


class Sum(BaseModel):
    """A sum."""

    a: int


@tool
def add(a: int) -> int:
    """Adds."""
    return a


class AnsweringEngine(ScriptedEngine):
    """Answers with its deltas; supports everything."""

    def __init__(self, *deltas: str | Delta) -> None:
        super().__init__(*deltas, end=FinishReason.TOOL_CALLS)
        self.run_freely()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(model="echo", engine="echo", context_length=8192, capabilities=Capabilities())


@pytest.fixture
async def engine() -> AsyncIterator[AnsweringEngine]:
    engine = AnsweringEngine(*CALLING)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def chat(engine: AnsweringEngine) -> EngineChat:
    return EngineChat(llm=EnginePipeline(engine=engine, model_id="echo", loop=asyncio.get_running_loop()))


@pytest.mark.parametrize(
    "message",
    [
        Message(Role.SYSTEM, "s", name="n"),
        Message(Role.USER, "u", name="n"),
        Message(Role.ASSISTANT, "a"),
        Message(Role.ASSISTANT, "", (CALL, ToolCall("call_2", "now", "{}")), reasoning="Hm.", name="n"),
        Message(Role.ASSISTANT, "a", (ToolCall("call_1", "add", '{"a": '),)),
        Message(Role.TOOL, "t", tool_call_id="call_1", name="add"),
        Message(Role.TOOL, "t"),
    ],
)
def test_a_message_is_the_same_on_its_way_there_and_back(message: Message):
    """Calls with their ids, one that was cut among them, reasoning and names."""
    assert message == from_langchain(to_langchain(message))


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (HumanMessage([{"type": "text", "text": "What is it?"}, IMAGE]), "image_url"),
        (SystemMessage([IMAGE]), "image_url"),
        (ToolMessage([IMAGE], tool_call_id="call_1"), "image_url"),
        (AIMessage([{"type": "thinking", "thinking": "Hm."}, "Well."]), "thinking"),
        (HumanMessage([{"type": "tool_use", "id": "call_1", "name": "add", "input": {}}]), "tool_use"),
    ],
)
def test_content_that_is_no_text_is_refused_rather_than_left_out(message: BaseMessage, kind: str):
    with pytest.raises(ValueError, match=f"content of the type {kind} is not supported, only text"):
        from_langchain(message)


def test_content_in_blocks_of_text_is_text():
    """Also beside the calls that other providers' answers repeat there."""
    blocks: list[str | dict[str, Any]] = ["a", {"type": "text", "text": "b"}]
    use = {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}}
    called = AIMessage([*blocks, use], tool_calls=[{"name": "add", "args": {"a": 1}, "id": "call_1"}])

    assert Message(Role.USER, "ab") == from_langchain(HumanMessage(blocks))
    assert Message(Role.ASSISTANT, "ab", (CALL,)) == from_langchain(called)


def test_langchains_messages_keep_their_calls():
    called = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "call_1"}])

    assert Message(Role.ASSISTANT, "", (CALL,)) == from_langchain(called)
    assert Message(Role.TOOL, "1", tool_call_id="call_1") == from_langchain(ToolMessage("1", tool_call_id="call_1"))


async def test_an_answer_has_calls_and_reasoning_in_langchains_places(chat: EngineChat):
    """Whole and as the sum of a stream's chunks, async and sync."""
    whole = await chat.ainvoke("1 + 1?")
    streamed: Any = None
    async for chunk in chat.astream("1 + 1?"):
        streamed = chunk if streamed is None else streamed + chunk
    sync = await asyncio.to_thread(chat.invoke, "1 + 1?")

    for message in (whole, streamed, sync):
        assert isinstance(message, AIMessage)
        assert ("So:", "Let me add.") == (message.content, message.additional_kwargs["reasoning_content"])
        called = [(call["id"], call["name"], call["args"]) for call in message.tool_calls]
        assert [("call_1", "add", {"a": 1}), ("call_2", "add", {})] == called
        assert "tool_calls" == message.response_metadata["finish_reason"]


async def test_a_stream_has_the_parts_of_calls_as_they_come(chat: EngineChat):
    chunks = [chunk async for chunk in chat.astream("1 + 1?")]

    parts = [(part["index"], part["name"], part["args"]) for chunk in chunks for part in chunk.tool_call_chunks]
    assert [(0, "add", '{"a"'), (0, None, ": 1}"), (1, "add", "{}")] == parts


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        (True, ToolChoice("required")),
        ("any", ToolChoice("required")),
        ("required", ToolChoice("required")),
        ("add", ToolChoice("required", "add")),
        ({"type": "function", "function": {"name": "add"}}, ToolChoice("required", "add")),
    ],
)
async def test_tools_that_are_bound_reach_the_engine(engine, chat, choice, expected):
    """Python functions, Pydantic classes, LangChain's tools and OpenAI's objects."""
    plain = {"type": "function", "function": {"name": "now"}}
    bound = chat.bind_tools([add, Sum, plain], tool_choice=choice, parallel_tool_calls=False)

    await bound.ainvoke([SystemMessage("s"), HumanMessage("1 + 1?")])

    (request,) = engine.requests
    assert ["add", "Sum", "now"] == [each.name for each in request.tools]
    assert ("Adds.", {"a"}) == (
        request.tools[0].description,
        json.loads(request.tools[0].parameters)["properties"].keys(),
    )
    assert Tool("now", None, '{"type": "object", "properties": {}}') == request.tools[2]
    assert (expected, False) == (request.tool_choice, request.parallel_tool_calls)


async def test_with_the_choice_none_the_model_is_told_of_no_tools(engine, chat):
    await chat.bind_tools([add], tool_choice="none").ainvoke("1 + 1?")

    assert () == engine.requests[0].tools


async def test_a_conversation_with_results_reaches_the_engine(engine, chat):
    called = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 1}, "id": "call_1"}])

    await chat.bind_tools([add]).ainvoke([HumanMessage("1 + 1?"), called, ToolMessage("2", tool_call_id="call_1")])

    assert (
        Message(Role.USER, "1 + 1?"),
        Message(Role.ASSISTANT, "", (CALL,)),
        Message(Role.TOOL, "2", tool_call_id="call_1"),
    ) == engine.requests[0].messages


@pytest.mark.parametrize(
    "arguments",
    [
        {"tool_choice": "required"},
        {"tools": [{"type": "custom"}]},
        {"tools": [{"type": "function", "function": {"name": "add"}}], "tool_choice": "now"},
        {"tools": [{"type": "function", "function": {"name": "add"}}], "tool_choice": 5},
        {"response_format": {"type": "xml"}},
        {"tool": []},
    ],
)
async def test_what_is_wrong_with_a_call_is_said(chat, arguments):
    with pytest.raises(ValueError, match=next(reversed(arguments)).split("_")[0]):
        await chat.ainvoke("hi", **arguments)


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_structured_output_is_enforced_and_parsed(method):
    """A Pydantic class gives its instances, and a JSON Schema plain values."""
    called = (Delta(tool_calls=(ToolCallDelta(id="1", name="Sum", arguments='{"a": 2}'),)),)
    engine = AnsweringEngine(*(called if method == "function_calling" else ('{"a"', ": 2}")))
    await engine.start()
    chat = EngineChat(llm=EnginePipeline(engine=engine, model_id="echo"))

    instance = await chat.with_structured_output(Sum, method=method).ainvoke("1 + 1?")
    plain = await chat.with_structured_output(Sum.model_json_schema(), method=method).ainvoke("1 + 1?")
    raw = await chat.with_structured_output(Sum, method=method, include_raw=True).ainvoke("1 + 1?")

    assert (Sum(a=2), {"a": 2}, Sum(a=2), None) == (instance, plain, raw["parsed"], raw["parsing_error"])
    request = engine.requests[0]
    if method == "function_calling":
        assert (ToolChoice("required", "Sum"), False) == (request.tool_choice, request.parallel_tool_calls)
    else:
        grammar = request.sampling.grammar
        assert isinstance(grammar, Grammar)
        assert ("a" in grammar.text) is (method == "json_schema")


async def test_what_does_not_parse_is_an_error_or_stands_beside_the_message(chat):
    both = chat.with_structured_output(Sum, include_raw=True)

    result = await both.ainvoke("1 + 1?")

    assert (None, "So:") == (result["parsed"], result["raw"].content)
    assert result["parsing_error"] is not None
    with pytest.raises(ValueError, match="schema"):
        chat.with_structured_output()
    with pytest.raises(ValueError, match="temperature"):
        chat.with_structured_output(Sum, temperature=1)
