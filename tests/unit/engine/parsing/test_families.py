"""What a family's template writes, its parser reads."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import AddedToken

from app.config import ModelConfig
from app.engine.base import ChatFormat
from app.engine.parsing.detection import detect_format
from app.engine.tokenizer.chat_traits import read_traits
from app.engine.tokenizer.shown_tokens import show_token
from tests.unit.engine.parsing.conversations import GOLDEN, TOOLS, Parsed, as_special, chat_format, parse
from tests.unit.tiny_models import chatml_tokenizer


@dataclass(frozen=True)
class Family:
    """A family's template, and which parts of a message it writes in one."""

    name: str
    end: str
    """What ends a turn."""
    reasoning: str | None = None
    text: bool = True
    """Whether a message may have text and calls."""
    calls: int = 2
    """Calls that one completion holds."""


FAMILIES = [
    Family("hermes", "<|im_end|>\n", "think"),
    Family("qwen_xml", "<|im_end|>\n"),
    Family("llama", "<|eot_id|>", text=False),
    Family("mistral", "</s>", text=False),
    Family("mistral_args", "</s>", "mistral"),
    Family("deepseek", "<｜end▁of▁sentence｜>", "think"),
    Family("deepseek_v31", "<｜end▁of▁sentence｜>", "think"),
    Family("gemma4", "<turn|>\n", "gemma4"),
    Family("function_gemma", "<end_of_turn>\n"),
    Family("phi", "<|end|>"),
    Family("harmony", "<|call|>", "harmony", calls=1),
]
ARGUMENTS: list[dict[str, Any]] = [{"city": 'São "Paulo" \\ {x} [y] <b>\n é', "days": 3}, {"a": 1.5, "b": -2}]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def render(family: Family, message: dict[str, Any]) -> tuple[str, str]:
    """Return the end of the prompt that the family's template makes, and the completion that is this message."""
    tokenizer = chatml_tokenizer((GOLDEN / f"{family.name}.jinja").read_text())
    schemas: list[Any] = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in TOOLS
    ]
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*messages, message], tools=schemas, tokenize=False)
    assert isinstance(whole, str)
    assert isinstance(prompt, str)
    assert whole.startswith(prompt)
    return prompt[-40:], whole.removeprefix(prompt).removesuffix(family.end)


def message_of(family: Family) -> dict[str, Any]:
    """Return the richest message that one completion of the family can be."""
    calls = [
        {"id": f"abcdefgh{number}", "type": "function", "function": {"name": tool.name, "arguments": arguments}}
        for number, (tool, arguments) in enumerate(zip(TOOLS[: family.calls], ARGUMENTS, strict=False))
    ]
    reasoning = {"reasoning_content": "They want\n\ntwo things."} if family.reasoning else {}
    return {"role": "assistant", "content": "Let me look." if family.text else "", "tool_calls": calls, **reasoning}


def expected(family: Family, parsed: Parsed) -> None:
    """Compare a parsed message with what went into the template."""
    message = message_of(family)
    thought = message.get("reasoning_content", "")
    # These templates leave the reasoning of earlier turns out.
    assert ("" if family.name.startswith("deepseek") else thought) == parsed.reasoning
    assert message["content"] == parsed.text
    assert [tool.name for tool in TOOLS[: family.calls]] == [name for name, _ in parsed.calls]
    assert ARGUMENTS[: family.calls] == [json.loads(arguments) for _, arguments in parsed.calls]


@families
def test_a_message_that_the_template_writes_is_read_as_it_was(family: Family):
    """Reasoning, text and calls come back, whether the marks are special tokens or text."""
    prompt_end, completion = render(family, message_of(family))

    golden = (GOLDEN / f"{family.name}.txt").read_text()

    assert golden == completion
    for special in (False, True):
        text = as_special(completion, family.name, family.reasoning) if special else completion
        chat = chat_format(family.name, family.reasoning, special=special)
        expected(family, parse(chat, text, prompt_end=prompt_end))


@families
def test_the_template_shows_which_format_it_is(family: Family):
    """Detection at load finds the format of calls and of reasoning in the template's own text."""
    tokenizer = chatml_tokenizer((GOLDEN / f"{family.name}.jinja").read_text())

    found = detect_format(read_traits(tokenizer), ModelConfig())

    assert family.name == found.tools
    if family.reasoning is not None:
        assert family.reasoning == found.reasoning


@families
def test_a_plain_answer_is_left_as_it_is(family: Family):
    """A message without calls comes through with every character."""
    text = "Braces { } and <b>tags</b>, [1] lists;\n\n    and code.\n"
    shown = f"<|channel|>final<|message|>{text}" if family.name == "harmony" else text

    assert Parsed(text) == parse(chat_format(family.name, family.reasoning), shown)


@families
def test_text_that_looks_like_a_mark_is_text_where_marks_are_special_tokens(family: Family):
    """A model that explains its own format calls nothing."""
    if family.name in ("llama", "qwen_xml"):
        pytest.skip("its calls need no mark")
    _, completion = render(family, message_of(family))
    chat = chat_format(family.name, family.reasoning, special=True)
    text = f"Look: {completion}"
    shown = f"{as_special('<|channel|>final<|message|>', 'harmony')}{text}" if family.name == "harmony" else text

    assert () == parse(chat, shown, prompt_end="").calls


def test_a_configured_format_is_taken_before_what_the_files_show():
    """`model.tool_format` and `model.reasoning_format` decide; none is no format."""
    traits = read_traits(chatml_tokenizer((GOLDEN / "hermes.jinja").read_text()))

    named = detect_format(traits, ModelConfig(tool_format="phi", reasoning_format="mistral"))
    none = detect_format(traits, ModelConfig(tool_format="none", reasoning_format="none"))

    assert ("phi", "mistral") == (named.tools, named.reasoning)
    assert (None, None, ()) == (none.tools, none.reasoning, none.special_marks)


def test_a_template_without_tools_has_the_default_format():
    """Its system text asks for the Hermes form; a token for thoughts shows the form of the reasoning."""
    found = detect_format(read_traits(chatml_tokenizer()), ModelConfig())

    assert ("hermes", "think") == (found.tools, found.reasoning)
    assert ["<think>"] == [name for name, _ in found.added_marks]


def test_the_tokenizers_own_description_of_its_answers_comes_first():
    """transformers' `response_template` names the marks, whatever the chat template shows."""
    tokenizer = chatml_tokenizer()
    tokenizer.response_template = {
        "fields": {
            "tool_calls": {"open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>"},
            "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        }
    }

    found = detect_format(read_traits(tokenizer), ModelConfig())

    assert ("gemma4", "gemma4") == (found.tools, found.reasoning)


ACTIONS = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<|START_THINKING|>", "close": "<|END_THINKING|>", "content": "text"},
        "tool_calls": {
            "open": "<|START_ACTION|>",
            "close": "<|END_ACTION|>",
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{tool_name}", "arguments": "{parameters}"}},
            "transform_each": True,
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}
"""A description as transformers has it, of a form that is in no table here."""


def described(**changes: Any) -> ChatFormat:
    tokenizer = chatml_tokenizer()
    marks = ["<|START_ACTION|>", "<|END_ACTION|>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    tokenizer.response_template = {**ACTIONS, **changes}
    return detect_format(read_traits(tokenizer), ModelConfig())


def action(text: str) -> str:
    return f"{show_token('<|START_ACTION|>')}{text}{show_token('<|END_ACTION|>')}"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_that_only_the_tokenizer_knows_is_read_by_its_description(chunked: bool):
    """transformers' own parser reads it; its marks are shown where they are special tokens."""
    call = action('[{"tool_name": "add", "parameters": {"a": 1}}, {"tool_name": "add", "parameters": {}}]')
    text = f"<|START_THINKING|>Hm.<|END_THINKING|>Well.\n{call}"

    found = described()
    parsed = parse(found, list(text) if chunked else text, prompt_end="<|im_start|>assistant\n")

    assert ("described", "described") == (found.tools, found.reasoning)
    assert {"<|START_ACTION|>", "<|END_ACTION|>", "<|im_end|>"} == {name for name, _ in found.special_marks}
    assert Parsed("Well.", "Hm.", (("add", '{"a": 1}'), ("add", "{}"))) == parsed


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (action("no JSON"), "no JSON"),
        (action('[{"tool_name": "nope", "parameters": {}}]'), '[{"tool_name": "nope", "parameters": {}}]'),
        (action('[{"parameters": {}}]') + " more", '[{"parameters": {}}] more'),
        (show_token("<|START_ACTION|>") + '[{"tool', '[{"tool'),
        ("plain\ntext ", "plain\ntext "),
        ("Well " + action("no JSON") + " more", "Well no JSON more"),
        ("Well <|START_ACTION|>no JSON<|END_ACTION|>", "Well <|START_ACTION|>no JSON<|END_ACTION|>"),
    ],
)
def test_what_a_description_does_not_fit_is_text(text: str, left: str):
    """Nothing is lost, whatever transformers' parser says of it."""
    assert Parsed(left) == parse(described(), text)
    assert Parsed(left) == parse(described(), list(text))


def test_a_description_whose_expressions_may_explode_is_not_used():
    """It comes with the model, and would hold up the event loop."""
    fields = {**ACTIONS["fields"], "content": {"close_pattern": r"(a+)+<\|im_end\|>"}}  # type: ignore[dict-item]

    assert "described" != described(fields=fields).tools
