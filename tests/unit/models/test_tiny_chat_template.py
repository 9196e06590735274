"""What the embedded model's chat template writes, with tools and without."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer.template_process import compile_template

MODEL = Path(__file__).parents[3] / "models" / "tiny-chat"
WITHOUT_TOOLS = (
    "{%- for message in messages -%}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{ '<|im_start|>assistant\\n' }}\n"
    "{%- endif -%}"
)
"""The template before there were tools."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(MODEL), local_files_only=True)
    return loaded


def rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    """What transformers writes, which has to be what the service writes."""
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    template, _ = compile_template((MODEL / "chat_template.jinja").read_text())
    assert text == template.render(messages=messages, tools=tools, add_generation_prompt=True, documents=None)
    return str(text)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def function(name: str, description: str = "", **schema: Any) -> dict[str, Any]:
    described = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **described, "parameters": {"type": "object", **schema}}}


ADD = function("add", "Add two numbers.", properties={"a": {"type": "integer"}, "b": {"type": "integer"}})
ADD_LINE = '{"name": "add", "description": "Add two numbers.", "parameters": {"a": "integer", "b": "integer"}}\n'


@pytest.mark.parametrize(
    "messages",
    [
        [user("Hello")],
        [{"role": "system", "content": "Be brief."}, user("  Hello\n")],
        [{"role": "system", "content": ""}, user(""), {"role": "assistant", "content": " Well "}, user("<|im_end|>")],
        [user("a"), user("b"), {"role": "system", "content": "<tools>"}, {"role": "assistant", "content": "{{ x }}"}],
        [],
    ],
)
@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("generate", [True, False])
def test_chats_without_tools_are_rendered_as_before_there_were_any(
    messages: list[dict[str, str]], tools: list[Any] | None, generate: bool
) -> None:
    """Character for character, so that what was learnt from such chats stays."""
    source = (MODEL / "chat_template.jinja").read_text()
    texts = [
        compile_template(template)[0].render(messages=messages, tools=tools, add_generation_prompt=generate)
        for template in (WITHOUT_TOOLS, source)
    ]

    assert texts[0] == texts[1]


def test_tools_stand_behind_the_system_text_one_a_line(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat without a system message gets one for them."""
    now = {"type": "function", "function": {"name": "now"}}
    block = f'<tools>\n{ADD_LINE}{{"name": "now", "parameters": {{}}}}\n</tools><|im_end|>\n'
    rest = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    bare = rendered(tokenizer, [user("Hi")], [ADD, now])
    with_system = rendered(tokenizer, [{"role": "system", "content": "Be brief."}, user("Hi")], [ADD, now])

    assert f"<|im_start|>system\n{block}{rest}" == bare
    assert f"<|im_start|>system\nBe brief.\n\n{block}{rest}" == with_system


def test_a_signature_is_as_short_as_a_call_needs(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a description 80 characters of its first line, of the parameters the required ones with their types."""
    properties = {
        "city": {"type": "string", "description": "Where.", "title": "City"},
        "unit": {"enum": ["c", "f"]},
        "day": {"type": ["string", "null"]},
        "place": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "detail": {"type": "boolean", "default": False},
    }
    tool = function("get", f"  {'x' * 90}\nArgs:\n", properties=properties, required=["city", "unit", "day", "place"])

    text = rendered(tokenizer, [user("Hi")], [tool])

    types = '{"city": "string", "unit": "c|f", "day": "string", "place": "any"}'
    assert f'<tools>\n{{"name": "get", "description": "{"x" * 80}", "parameters": {types}}}\n</tools>' in text


def test_a_python_function_is_a_tool(tokenizer: PreTrainedTokenizerFast) -> None:
    """As transformers makes its schema."""

    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: One number.
            b: Another.
        """
        return a + b

    text = tokenizer.apply_chat_template([user("Hi")], tools=[add], tokenize=False)

    assert f"<tools>\n{ADD_LINE}</tools>" in text


CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": 5}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("arguments", [({"a": 7, "b": 5}, {}), ('{"a": 7, "b": 5}', "{}"), ('{"a": 7, "b": 5}', "")])
@pytest.mark.parametrize(("content", "before"), [(None, ""), ("", ""), ("One moment.", "One moment.\n")])
def test_calls_and_their_results_come_back_as_the_model_wrote_and_read_them(
    tokenizer: PreTrainedTokenizerFast, arguments: tuple[Any, Any], content: str | None, before: str
) -> None:
    """Arguments as an object or as JSON text; results that follow each other are one turn of the user."""
    calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": each}}
        for name, each in zip(("add", "now"), arguments, strict=True)
    ]
    messages = [
        user("Hi"),
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_add", "content": "12"},
        {"role": "tool", "tool_call_id": "call_now", "content": "10:30"},
    ]

    text = rendered(tokenizer, messages, [ADD])

    results = "<tool_response>\n12\n</tool_response>\n<tool_response>\n10:30\n</tool_response>"
    turns = [f"assistant\n{before}{CALLS}<|im_end|>\n", f"user\n{results}<|im_end|>\n", "assistant\n"]
    assert text.endswith("".join(f"<|im_start|>{turn}" for turn in turns))


def test_results_around_an_answer_are_turns_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """Only results that follow each other share a turn."""
    messages = [
        user("Hi"),
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "One."},
        {"role": "function", "name": "add", "content": "2"},
        user("Thanks"),
    ]

    text = rendered(tokenizer, messages)

    turn = "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n"
    assert (
        text.partition("Hi<|im_end|>\n")[2]
        == turn.format(1)
        + "<|im_start|>assistant\nOne.<|im_end|>\n"
        + turn.format(2)
        + "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"
    )


def test_content_as_parts_is_refused_and_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    """The template takes text; who asks which form it takes must not find that it takes both."""
    parts: Any = [{"type": "text", "text": "Hi"}]

    with pytest.raises(TypeError):
        tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
