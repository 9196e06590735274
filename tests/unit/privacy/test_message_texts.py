"""A filter sees every text of messages and tools, and nothing that it returns makes JSON invalid."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.privacy.message_texts import TEXTS_AT_ONCE, map_texts
from app.types import Message, Role, Tool, ToolCall


async def upper(texts: list[str]) -> list[str]:
    assert len(texts) <= TEXTS_AT_ONCE
    return [text.upper() for text in texts]


async def test_every_text_of_a_message_passes_the_filter():
    """What was said, thought and named, and the strings of arguments, keys too; ids and names of functions do not."""
    call = ToolCall("call_a", "look_up", '{"city": "rome", "n": 1.50, "more": ["x\\"y", {"k": null}]}')
    message = Message(Role.ASSISTANT, "text", tool_calls=(call,), tool_call_id="id", reasoning="thought", name="bob")

    (result,) = await map_texts([message], upper)

    assert ("TEXT", "THOUGHT", "BOB", "id") == (result.content, result.reasoning, result.name, result.tool_call_id)
    arguments = '{"CITY": "ROME", "N": 1.50, "MORE": ["X\\"Y", {"K": null}]}'
    assert (ToolCall("call_a", "look_up", arguments),) == result.tool_calls


async def test_every_text_of_a_tool_passes_the_filter():
    tool = Tool(
        "look_up", "finds it", '{"properties": {"city": {"description": "where", "enum": ["rome"]}}}', strict=True
    )

    (result,) = await map_texts([tool], upper)

    assert ("look_up", "FINDS IT", True) == (result.name, result.description, result.strict)
    assert {"PROPERTIES": {"CITY": {"DESCRIPTION": "WHERE", "ENUM": ["ROME"]}}} == json.loads(result.parameters)


async def test_what_is_no_json_is_filtered_as_a_text():
    """A call that was cut has arguments without an end, and what they hold is personal all the same."""
    for arguments in ('{"city": "ro', "rome", "", "[" * 100_000):
        message = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("a", "f", arguments),))
        (result,) = await map_texts([message], upper)
        assert arguments.upper() == result.tool_calls[0].arguments


async def test_what_the_filter_leaves_alone_stays_as_it_was_written():
    """Spaces, escapes and digits of numbers are the model's own."""
    written = '{ "a" : "\\u00e4", "n": 1e2,\n"b": "x" }'

    async def only_x(texts: list[str]) -> list[str]:
        return ["y" if text == "x" else text for text in texts]

    message = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("a", "f", written),))
    (result,) = await map_texts([message], only_x)

    assert written.replace('"x"', '"y"') == result.tool_calls[0].arguments


async def test_a_text_that_comes_often_is_filtered_once():
    seen: list[str] = []

    async def counting(texts: list[str]) -> list[str]:
        seen.extend(texts)
        return texts

    await map_texts([Message(Role.USER, "same")] * 5, counting)
    assert ["same"] == seen


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(_JSON, st.text(), st.booleans())
async def test_json_stays_json_whatever_the_mask(value: Any, mask: str, escaped: bool):
    async def masked(texts: list[str]) -> list[str]:
        return [mask] * len(texts)

    message = Message(
        Role.ASSISTANT, "", tool_calls=(ToolCall("a", "f", json.dumps({"v": value}, ensure_ascii=escaped)),)
    )
    (result,) = await map_texts([message], masked)

    def replaced(one: Any) -> Any:
        if isinstance(one, str):
            return mask
        if not isinstance(one, dict):
            return [*map(replaced, one)] if isinstance(one, list) else one
        return dict.fromkeys([mask], [*map(replaced, one.values())][-1]) if one else one  # equal keys: the last counts

    assert {mask: replaced(value)} == json.loads(result.tool_calls[0].arguments)


async def test_half_of_a_surrogate_pair_stays_escaped_where_a_string_is_changed():
    """JSON can hold it as an escape only; as a character it could be neither encoded, nor stored, nor sent."""
    written = '{"a": "\\ud83d jane.doe@example.com"}'

    async def masked(texts: list[str]) -> list[str]:
        return [text.replace("jane.doe@example.com", "[EMAIL]") for text in texts]

    message = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("a", "f", written),))
    (result,) = await map_texts([message], masked)

    assert '{"a": "\\ud83d [EMAIL]"}' == result.tool_calls[0].arguments
