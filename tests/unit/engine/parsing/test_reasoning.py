"""What a model thinks before it answers is no part of the answer."""

import pytest

from tests.unit.engine.parsing.conversations import Parsed, chat_format, parse

THINK = chat_format(None, "think")
HARMONY = chat_format(None, "harmony")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nWell.\n\nYes.\n</think>\n\nHello\n", Parsed("Hello\n", "Well.\n\nYes.")),
        ("\n<think>a</think>b", Parsed("b", "a")),
        ("<think>\n\n</think>\n\nHello", Parsed("Hello")),
        ("Hello <think>a</think>", Parsed("Hello <think>a</think>")),
        ("  Hello", Parsed("  Hello")),
        ("<think>cut\n", Parsed("", "cut\n")),
        ("<thi", Parsed("<thi")),
        ("<think>a</think>\n    indented", Parsed("    indented", "a")),
    ],
)
def test_thoughts_stand_at_the_beginning(text: str, expected: Parsed):
    """The newlines around them are the template's; a cut within them leaves no answer."""
    assert expected == parse(THINK, text)
    assert expected == parse(THINK, list(text))


@pytest.mark.parametrize("prompt_end", ["<|assistant|>\n<think>", "<|assistant|>\n<think>\n"])
def test_a_prompt_that_ends_with_the_mark_begins_the_thoughts(prompt_end: str):
    """Some templates write the mark themselves."""
    assert Parsed("b", "a") == parse(THINK, "a\n</think>\n\nb", prompt_end=prompt_end)


def test_a_prompt_that_closes_the_thoughts_leaves_none():
    """Templates that switch thinking off write an empty thought."""
    assert Parsed("a </think> b") == parse(THINK, "a </think> b", prompt_end="<|assistant|>\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("continued", "expected"),
    [
        ("<think>\nWell, I", Parsed("b", "a")),
        ("<think>Well</think>The", Parsed("a</think>b")),
        ("The", Parsed("a</think>b")),
    ],
)
def test_a_message_that_is_continued_goes_on_where_it_breaks_off(continued: str, expected: Parsed):
    """Within its thoughts, or behind them."""
    assert expected == parse(THINK, "a</think>b", continued=continued)


def test_each_family_has_its_own_marks():
    """Mistral's, and Gemma's with a word behind the token."""
    assert Parsed("b", "a") == parse(chat_format(None, "mistral"), "[THINK]a[/THINK]b")
    assert Parsed("b", "a") == parse(chat_format(None, "gemma4"), "<|channel>thought\na\n<channel|>b")
    assert Parsed("<|channel>other") == parse(chat_format(None, "gemma4"), "<|channel>other")


def test_a_call_within_the_thoughts_is_a_thought():
    """What a model considers to do, it does not do yet."""
    call = '<tool_call>{"name": "add"}</tool_call>'

    assert Parsed("", call) == parse(chat_format("hermes", "think"), f"<think>{call}")


def test_harmonys_channels_are_reasoning_answer_and_calls():
    """Thoughts of several messages are one text; what is said before a call is part of the answer."""
    text = (
        "<|channel|>analysis<|message|>One<|end|><|start|>assistant<|channel|>analysis<|message|>Two<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
    )

    assert Parsed("Let me see.", "One\nTwo", (("add", '{"a": 1}'),)) == parse(
        chat_format("harmony", "harmony"), text, prompt_end="<|start|>assistant"
    )


@pytest.mark.parametrize(
    ("prompt_end", "text", "expected"),
    [
        ("<|start|>assistant", "<|channel|>final<|message|>Hi<|return|>", Parsed("Hi")),
        ("<|start|>assistant<|channel|>final<|message|>Hel", "lo", Parsed("lo")),
        ("<|start|>assistant<|channel|>analysis<|message|>Well", " yes<|end|>", Parsed("", "yes")),
        ("<|start|>assistant", "no channel at all", Parsed("no channel at all")),
        ("<|start|>assistant", "<|channel|>fin", Parsed("")),
        ("", "text", Parsed("text")),
    ],
)
def test_harmony_begins_where_the_prompt_ends(prompt_end: str, text: str, expected: Parsed):
    """In a header, in a message, or without either."""
    assert expected == parse(HARMONY, text, prompt_end=prompt_end)
    assert expected == parse(HARMONY, list(text), prompt_end=prompt_end)


def test_a_recipient_that_is_no_tool_is_text():
    """Nothing is called that the caller did not give."""
    text = '<|channel|>commentary to=functions.nope <|constrain|>json<|message|>{"a": 1}'

    assert Parsed('{"a": 1}') == parse(chat_format("harmony", "harmony"), text)
