"""What becomes of a completion, however it is cut and whatever is wrong with it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.parsing.completion_parser import CompletionParser
from app.engine.parsing.formats import TOOL_FORMATS, marks_of
from app.engine.tokenizer.shown_tokens import hide_tokens, show_token
from app.types import Tool
from tests.unit.engine.parsing.conversations import (
    ADD,
    GOLDEN,
    TOOLS,
    WEATHER,
    Parsed,
    calls_of,
    chat_format,
    parse,
    parts_of,
)

FRAGMENTS = [
    '{"name": "add", "arguments": ',
    '{"name": "nope", "arguments": ',
    '{"name": "add", "parameters": {"a": 1}}',
    '{"a": 1, "b": [2, {"c": "\\"}"}]}',
    "<function=add>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "call:add{a:1,b:",
    "functools[",
    "function",
    "add",
    "assistant",
    "to=functions.add",
    "analysis",
    "final",
    "thought",
    "```json\n",
    *'{}[]",:;\\\n <>|`',
    "1",
    "true",
    "é",
    "word ",
]
EVERYTHING = [
    (tools, reasoning) for tools in TOOL_FORMATS for reasoning in (None, "think", "mistral", "gemma4", "harmony")
]


@st.composite
def completions(draw: st.DrawFn) -> tuple[str, str | None, bool, list[str], bool]:
    """A format, a completion made of what means something in it, its chunks, and whether it is cut."""
    tools, reasoning = draw(st.sampled_from(EVERYTHING))
    special = draw(st.booleans())
    marks = marks_of(tools, reasoning)
    marks = tuple(map(show_token, marks)) if special else marks
    fragments = draw(st.lists(st.sampled_from([*marks, *FRAGMENTS]), max_size=30))
    text = "".join(fragments)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=40)))
    chunks = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    return tools, reasoning, special, chunks, draw(st.booleans())


@given(completions())
def test_the_cut_of_a_completion_into_chunks_changes_nothing(drawn: tuple[str, str | None, bool, list[str], bool]):
    """Whatever the model writes, and wherever its text is cut, the message is that of the whole."""
    tools, reasoning, special, chunks, cut = drawn
    chat = chat_format(tools, reasoning, special=special)

    assert parse(chat, "".join(chunks), cut=cut) == parse(chat, chunks, cut=cut)


@given(completions())
def test_text_without_calls_and_reasoning_loses_nothing(drawn: tuple[str, str | None, bool, list[str], bool]):
    """Where nothing is called, everything that a decoder would show is in the answer."""
    tools, _, special, chunks, cut = drawn
    if tools == "harmony":
        return
    text = "".join(chunks)

    parsed = parse(chat_format(tools, special=special), chunks, cut=cut)

    if not parsed.calls:
        assert hide_tokens(text) == parsed.text


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_golden_message_is_the_same_token_by_token(name: str):
    """Arguments are streamed: each character of them comes with the chunk that has it, or soon after."""
    text = (GOLDEN / f"{name}.txt").read_text()
    chat = chat_format(name, "harmony" if name == "harmony" else None)
    parser = CompletionParser(chat, {tool.name: tool for tool in TOOLS}, "")

    deltas = [sum(part.call is not None for part in parser.feed(character)) for character in text]

    assert parse(chat, text) == parse(chat, list(text))
    assert max(deltas) <= 3
    assert sum(map(bool, deltas)) > 20


def test_a_call_begins_with_its_id_and_name():
    """The first part of a call has both, and its arguments follow."""
    parser = CompletionParser(chat_format("hermes"), {"add": ADD}, "")

    chunks = ['<tool_call>{"name": "add"', ', "arguments": {"a": 1', ', "b": 2}}</tool_call>']

    calls = [[part.call for part in parser.feed(chunk) if part.call is not None] for chunk in chunks]

    (first,) = calls[0]
    assert ("add", "") == (first.name, first.arguments)
    assert re.fullmatch(r"call_[0-9a-f]{24}", first.id or "")
    assert {(0, None, None)} == {(call.position, call.id, call.name) for call in calls[1] + calls[2]}
    assert ['{"a": 1', ', "b": 2}'] == ["".join(call.arguments for call in chunk) for chunk in calls[1:]]


def test_mistrals_ids_are_nine_letters_or_digits():
    """Its templates refuse others; an id that the model writes itself is taken."""
    parser = CompletionParser(chat_format("mistral_args"), {"add": ADD}, "")
    text = '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]abcdefgh1[ARGS]{"a": 2}'

    calls = calls_of(parts_of(parser, [text]))

    assert re.fullmatch(r"[a-zA-Z0-9]{9}", calls[0].id)
    assert "abcdefgh1" == calls[1].id


def test_ids_differ():
    """No two calls have one id."""
    text = '<tool_call>{"name": "add"}</tool_call>' * 50
    parser = CompletionParser(chat_format("hermes"), {"add": ADD}, "")

    assert 50 == len({call.id for call in calls_of(parts_of(parser, [text]))})


def test_without_parallel_calls_the_first_is_the_last():
    """The completion is over with the end of the first call, whatever follows."""
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    parser = CompletionParser(chat_format("hermes"), {"add": ADD}, "", parallel=False)

    parts = parts_of(parser, [text, text, "more"])

    assert parser.output.is_over
    assert [("add", '{"a": 1}')] == [(call.name, call.arguments) for call in calls_of(parts)]
    assert "" == "".join(part.text for part in parts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>', Parsed),
        ('<tool_call>\n{"name": "add" "arguments": {}}', Parsed("", calls=(("add", "{}"),))),
        ('<tool_call>\n{"nam', Parsed),
        ("<tool_call>\nadd(1, 2)\n</tool_call>", Parsed),
        ("<tool_call>", Parsed),
        ("a <tool_call", Parsed),
        ('{"name": "add", "arguments": {}}', Parsed),
        (
            '<tool_call>{"name": "add", "arguments": {"a": 1,, }}</tool_call>',
            Parsed("", calls=(("add", '{"a": 1,, }'),)),
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', Parsed("", calls=(("add", '{"a": 1}'),))),
        (
            '<tool_call>{"name": "add", "arguments": {"a": (1)}}</tool_call>',
            Parsed("", calls=(("add", '{"a": (1)}}'),)),
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', Parsed("", calls=(("add", '{"a": 1'),))),
        ('<tool_call>{"name": "add"}</tool_call>', Parsed("", calls=(("add", "{}"),))),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', Parsed("", calls=(("add", "{}"),))),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', Parsed("", calls=(("add", '{"a": 1}'),))),
        (
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
            Parsed("", calls=(("add", '{"a": 1}'),)),
        ),
        (
            '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"}}</tool_call>',
            Parsed("", calls=(("add", '{"a": "</tool_call>"}'),)),
        ),
        (
            'One\n<tool_call>{"name": "nope"}</tool_call>\n<tool_call>{"name": "add"}</tool_call>\nTwo',
            Parsed('One\n<tool_call>{"name": "nope"}</tool_call>\nTwo', calls=(("add", "{}"),)),
        ),
    ],
)
def test_bad_output_is_text_or_the_arguments_of_a_call_that_has_begun(text: str, expected: Parsed | type[Parsed]):
    """Nothing that the model writes is lost, and nothing is called that is no tool."""
    wanted = expected if isinstance(expected, Parsed) else expected(text)

    assert wanted == parse(chat_format("hermes"), text, tools=[ADD])


def test_only_given_tools_are_called():
    """A tool that the caller did not give is none, and without tools there are no calls at all."""
    text = '<tool_call>{"name": "add"}</tool_call>'

    assert () == parse(chat_format("hermes"), text, tools=[WEATHER]).calls
    assert Parsed(text) == parse(chat_format("hermes"), text, tools=[])


@pytest.mark.parametrize("mark", ["", "<|python_tag|>"])
def test_llamas_answers_in_json_are_no_calls(mark: str):
    """An object without a known name is the answer."""
    text = mark + ' {"city": "Paris", "list": [1, 2]}\n'

    assert Parsed(text) == parse(chat_format("llama"), text)


def test_values_in_the_xml_form_have_the_types_of_the_schema():
    """Text becomes a string as it is, and what the schema wants otherwise that, where it can be."""
    text = (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\n\n12 "x"\n \n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=unit>\nc\n</parameter>\n"
        "<parameter=more>\n[1, true]\n</parameter>\n</function>\n</tool_call>"
    )

    ((_, arguments),) = parse(chat_format("qwen_xml"), text).calls

    assert {"city": '\n12 "x"\n ', "days": 3, "unit": "c", "more": [1, True]} == json.loads(arguments)


def test_a_value_that_is_not_of_the_schemas_type_is_a_string():
    """Python's literals are understood, and nothing else is guessed."""
    text = (
        "<function=add>\n<parameter=a>\nmany\n</parameter>\n<parameter=b>\n-1.5e3\n</parameter>\n"
        "<parameter=c>\nTrue\n</parameter>\n</function>"
    )

    ((_, arguments),) = parse(chat_format("qwen_xml"), text).calls

    assert {"a": "many", "b": -1500.0, "c": True} == json.loads(arguments)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_has_no_number_for_is_a_string(word: str):
    """Arguments that a client reads by the standard have to be JSON."""
    text = f"<function=add>\n<parameter=a>\n{word}\n</parameter>\n</function>"

    ((_, arguments),) = parse(chat_format("qwen_xml"), text).calls

    assert f'{{"a": "{word}"}}' == arguments


@pytest.mark.parametrize("schema", ['{"type": [["number"]]}', '{"anyOf": 5}', '{"oneOf": {"a": 1}}', '{"enum": 3}'])
def test_a_schema_that_means_nothing_breaks_no_call(schema: str):
    text = "<function=odd>\n<parameter=a>\n1\n</parameter>\n</function>"
    odd = Tool("odd", parameters=f'{{"properties": {{"a": {schema}}}}}')

    ((_, arguments),) = parse(chat_format("qwen_xml"), text, tools=[odd]).calls

    assert {"a": 1} == json.loads(arguments)


def test_a_call_cut_before_its_arguments_has_none():
    """A completion that is cut does not get arguments that the model did not write; one that ended does."""
    text = '<tool_call>{"name": "add", "arguments": '

    assert (("add", ""),) == parse(chat_format("hermes"), text, cut=True).calls
    assert (("add", "{}"),) == parse(chat_format("hermes"), text).calls


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("deep", ["[" * 20_000, '{"a":' * 20_000, "{a:" * 20_000])
def test_arguments_that_go_too_deep_fail_nobody(name: str, deep: str):
    """Whatever a model writes within itself comes out in linear time."""
    heads = {
        "hermes": '<tool_call>{"name": "add", "arguments": {"a": ',
        "qwen_xml": "<function=add>\n<parameter=a>\n",
        "llama": '{"name": "add", "parameters": {"a": ',
        "mistral": '[TOOL_CALLS][{"name": "add", "arguments": {"a": ',
        "mistral_args": '[TOOL_CALLS]add[ARGS]{"a": ',
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n",
        "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>",
        "gemma4": "<|tool_call>call:add{a:",
        "function_gemma": "<start_function_call>call:add{a:",
        "phi": 'functools[{"name": "add", "arguments": {"a": ',
        "harmony": "<|channel|>commentary to=functions.add<|message|>",
    }

    tail = "\n</parameter>\n</function>" if name == "qwen_xml" else ""

    parsed = parse(chat_format(name), heads[name] + deep + tail)

    ((_, arguments),) = parsed.calls
    assert arguments.count("[") + arguments.count("{") >= 20_000
