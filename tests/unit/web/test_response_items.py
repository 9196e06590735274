"""Items of the Responses API and the messages that they stand for."""

import time
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.errors import InvalidRequest, PromptTooLong
from app.types import Message, Role, ToolCall
from app.web.openai.responses.items import InputItem, ItemReference, assistant_items, input_items, resolved, to_messages

ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])
TEXT = st.text(max_size=8)
CALLS = st.lists(st.builds(ToolCall, st.uuids().map(str), st.sampled_from(["add", "look_up"]), TEXT), max_size=3)
ANSWERS = st.builds(
    Message,
    st.just(Role.ASSISTANT),
    TEXT,
    tool_calls=CALLS.map(tuple),
    reasoning=st.none() | st.text(min_size=1, max_size=8),
)


def ids():
    numbers = count()
    return lambda kind: f"{kind}_{next(numbers)}"


@given(ANSWERS)
def test_what_the_assistant_said_comes_back_as_the_message_that_it_was(message: Message):
    """Reasoning, text and calls are several items, and one message again."""
    items = ITEMS.validate_python(assistant_items(message, ids()))

    assert [message] == to_messages(items)


@given(st.lists(st.one_of(ANSWERS, st.builds(Message, st.sampled_from([Role.USER, Role.SYSTEM]), TEXT)), max_size=4))
def test_a_conversation_of_items_is_the_same_messages_again(messages: list[Message]):
    """In their order; two messages of the assistant in a row stay two where the second has text or reasoning."""
    items = ITEMS.validate_python(input_items(messages, ids()))
    joined = to_messages(items)

    assert [each.content for each in messages if each.content] == [each.content for each in joined if each.content]
    assert [call for each in messages for call in each.tool_calls] == [
        call for each in joined for call in each.tool_calls
    ]


def test_calls_and_results_become_the_messages_that_templates_expect():
    """Calls in a row belong to one message; a result knows the name of its function."""
    items = ITEMS.validate_python(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "look_up", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "2", "output": "Paris"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "12"}]},
        ]
    )

    assert [
        Message(Role.SYSTEM, "Be brief."),
        Message(Role.USER, "a\nb"),
        Message(
            Role.ASSISTANT,
            "",
            tool_calls=(ToolCall("1", "add", "{}"), ToolCall("2", "look_up", "{}")),
            reasoning="hm",
        ),
        Message(Role.TOOL, "Paris", tool_call_id="2", name="look_up"),
        Message(Role.TOOL, "12", tool_call_id="1", name="add"),
    ] == to_messages(items)


async def test_a_reference_stands_for_the_item_that_it_names():
    """And one that names nothing is refused by its place."""
    (known,) = ITEMS.validate_python([{"role": "assistant", "content": "Hi"}])

    async def find(item_id: str):
        return known if item_id == "msg_1" else None

    items = await resolved([ItemReference(type="item_reference", id="msg_1")], find, 2)
    assert [known] == items
    with pytest.raises(InvalidRequest, match=r"input\.1\.id"):
        await resolved([known, ItemReference(type="item_reference", id="msg_2")], find, 0)


async def test_references_cannot_make_a_request_larger_than_it_may_be():
    """Each item is named once, and their characters count before all of them are looked for."""
    (known,) = ITEMS.validate_python([{"type": "function_call", "call_id": "1", "name": "add", "arguments": "x" * 60}])
    looked_for = []

    async def find(item_id: str):
        looked_for.append(item_id)
        return known

    references = [ItemReference(type="item_reference", id=f"fc_{number}") for number in range(9)]
    with pytest.raises(InvalidRequest, match=r"input\.1\.id is named before"):
        await resolved([references[0], references[0]], find, 0)
    looked_for.clear()
    with pytest.raises(PromptTooLong):
        await resolved(references, find, 100)

    assert ["fc_0", "fc_1"] == looked_for


def test_reasoning_stays_before_what_it_led_to():
    """Items of it that follow each other are one; without an answer behind it, it is a message by itself."""

    def thought(text: str):
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

    items = ITEMS.validate_python(
        [
            *(thought("a"), thought("b"), {"role": "user", "content": "go on"}),
            *(thought("c"), {"role": "assistant", "content": "Hi"}, thought("d")),
            *({"type": "function_call_output", "call_id": "1", "output": "12"}, thought("e")),
        ]
    )

    assert [
        Message(Role.ASSISTANT, "", reasoning="a\nb"),
        Message(Role.USER, "go on"),
        Message(Role.ASSISTANT, "Hi", reasoning="c"),
        Message(Role.ASSISTANT, "", reasoning="d"),
        Message(Role.TOOL, "12", tool_call_id="1"),
        Message(Role.ASSISTANT, "", reasoning="e"),
    ] == to_messages(items)


def test_a_call_may_have_any_name_that_a_tool_may_have():
    call = {"type": "function_call", "call_id": "1", "name": "n" * 128, "arguments": "{}"}

    assert "n" * 128 == to_messages(ITEMS.validate_python([call]))[0].tool_calls[0].name
    with pytest.raises(ValidationError):
        ITEMS.validate_python([{**call, "name": "n" * 129}])


def test_many_items_of_reasoning_take_no_longer_than_their_texts():
    """A long one is not copied for each that follows it."""
    texts = ["x" * 4_000_000, *"y" * 1000]
    items = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in texts]
    validated = ITEMS.validate_python(items)
    began = time.process_time()
    (message,) = to_messages(validated)

    assert time.process_time() - began < 0.2
    assert "\n".join(texts) == message.reasoning
