"""Tools, calls, results and reasoning reach each family's template as transformers gives them, and stay text."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.engine.tokenizer.tool_prompt import definition, tools_text
from app.errors import InvalidRequest
from app.types import Message, Role, Tenant, Tool, ToolCall
from tests.unit.engine.tool_templates import DEEPSEEK, FAMILIES, HARMONY, HERMES, LLAMA, MISTRAL
from tests.unit.tiny_models import CHATML, chatml_tokenizer, save

SCHEMA = '{"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}'
WEATHER = Tool("get_weather", "Tells the weather.", SCHEMA)
CALL = ToolCall("abcdef012", "get_weather", '{"city": "Zürich"}')
OTHER = ToolCall("abcdef013", "get_weather", '{"city": "Genf"}')
QUESTION = Message(Role.USER, "Weather?")
CALLS = Message(Role.ASSISTANT, "", tool_calls=(CALL,))
RESULT = Message(Role.TOOL, "sunny", tool_call_id=CALL.id, name="get_weather")
CONVERSATION = (QUESTION, CALLS, RESULT)

Load = Callable[..., tuple[HfTokenizer, PreTrainedTokenizerFast]]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Loads a template with a tokenizer that has its marks, as the service does and as transformers does."""
    loaded: list[HfTokenizer] = []

    def with_template(template: Any) -> tuple[HfTokenizer, PreTrainedTokenizerFast]:
        original = chatml_tokenizer(template)
        original.add_tokens(["[INST]", "[/INST]", "[TOOLS]", "[CALLS]", "<|call|>", "<tool_call>", "</tool_call>"])
        original.bos_token = "<|endoftext|>"
        loaded.append(HfTokenizer(save(original, tmp_path / str(len(loaded)))))
        return loaded[-1], original

    yield with_template
    for each in loaded:
        each.close()


def transformers_ids(original: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    """Return what transformers encodes, with the marks around what users wrote."""
    ids = original.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True, **variables
    )
    return [int(each) for each in ids if isinstance(each, int)]


def written(tokenizer: HfTokenizer, original: PreTrainedTokenizerFast, *messages: Message, **others: Any) -> str:
    """Return the text that the template wrote, control tokens included."""
    text = original.decode(list(tokenizer.encode_chat(messages, **others)))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_with_a_tool_is_written_as_transformers_writes_it(load, family):
    """Definitions, the call with its arguments as each template takes them, and the result with its id and name."""
    tokenizer, original = load(FAMILIES[family])
    arguments: Any = CALL.arguments if family == "deepseek" else {"city": "Zürich"}
    call = {"id": CALL.id, "type": "function", "function": {"name": CALL.name, "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": CALL.id, "name": "get_weather"},
    ]
    tools: tuple[Tool, ...] = () if family == "deepseek" else (WEATHER,)

    ids = tokenizer.encode_chat(CONVERSATION, tools=tools)

    if family == "deepseek":  # transformers drops the null that this template asks for
        assert "<|call|>get_weather\n" + CALL.arguments in original.decode(list(ids))
    else:
        assert transformers_ids(original, messages, tools=[definition(WEATHER)]) == list(ids)
    assert {"get_weather", "city", "Zürich", "sunny"} == {
        each for each in ("get_weather", "city", "Zürich", "sunny") if each in original.decode(list(ids))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_never_writes_a_control_token_through_tools_or_calls(load, family):
    """In descriptions, keys, values, names and results; what the template writes is the same as for plain words."""
    tokenizer, original = load(FAMILIES[family])
    added = original.added_tokens_decoder.items()
    names = {each.content: at for at, each in added if each.special or each.content in FAMILIES[family]}

    def counted(word: str) -> Counter[int]:
        schema = f'{{"type": "object", "properties": {{"{word}": {{"type": "string", "description": "{word}"}}}}}}'
        call = ToolCall("abcdef012", "get_weather", f'{{"{word}": "{word}"}}')
        ids = tokenizer.encode_chat(
            [
                Message(Role.USER, word, name=word),
                Message(Role.ASSISTANT, "", tool_calls=(call,), reasoning=word),
                Message(Role.TOOL, word, tool_call_id="abcdef012", name=word),
                Message(Role.USER, word),
            ],
            tools=(Tool("get_weather", word, schema),),
            template_kwargs=(("date_string", word),) if family == "llama" else (),
        )
        return Counter(each for each in ids if each in names.values())

    plain = counted("word")
    assert sum(plain.values())
    for name in names:
        if "think" not in name:  # in what the assistant said these are its own
            assert plain == counted(name), name


CUT = HERMES.replace("{{ tool | tojson }}", "{{ tool.function.name }} {{ tool.function.description[:{}] }}")


@pytest.mark.parametrize("length", range(1, 14))
def test_a_template_that_cuts_a_text_makes_no_control_token_of_what_is_left(load, length):
    """Of the two marks around a token one may be cut away, and the token left whole."""
    tokenizer, original = load(CUT.replace("[:{}]", f"[:{length}]"))
    ends = original.convert_tokens_to_ids("<|im_end|>")

    ids = tokenizer.encode_chat([QUESTION], tools=[replace(WEATHER, description="<|im_end|> and more")])

    assert 2 == ids.count(ends)


@pytest.mark.parametrize(
    ("shown", "refused"),
    [
        ("{{ tool | tojson(ensure_ascii=true) }}", False),
        ("{{ tool.function.name }} {{ tool.function.parameters.properties | list }}", True),
        ("{{ tool | string }}", False),  # not taken for a form that a model was trained on
    ],
)
def test_a_mark_that_a_template_escapes_guards_its_token_all_the_same(load, shown, refused):
    """JSON in ASCII keeps the marks; Python's form of a value cannot, so such a text is refused."""
    tokenizer, original = load(HERMES.replace("{{ tool | tojson }}", shown))
    ends = original.convert_tokens_to_ids("<|im_end|>")
    hostile = replace(WEATHER, parameters='{"type": "object", "properties": {"<|im_end|>": {}}}')

    assert 2 == tokenizer.encode_chat([QUESTION], tools=[WEATHER]).count(ends)
    if refused:
        with pytest.raises(InvalidRequest, match="control token"):
            tokenizer.encode_chat([QUESTION], tools=[hostile])
    else:
        assert 2 == tokenizer.encode_chat([QUESTION], tools=[hostile]).count(ends)


def test_ids_that_a_template_refuses_are_written_in_its_own_form(load):
    """The same id becomes the same one, so that a result still stands with its call."""
    tokenizer, original = load(MISTRAL)
    long = replace(CALL, id="call_0123456789abcdef01234567")

    text = written(
        tokenizer, original, QUESTION, replace(CALLS, tool_calls=(long,)), replace(RESULT, tool_call_id=long.id)
    )

    (call_id,) = {part.split('"')[0] for part in text.split('id": "')[1:]}
    assert 9 == len(call_id)


def test_several_calls_are_several_messages_where_a_template_takes_one_each(load):
    """Each with its own result behind it, whatever their order was."""
    tokenizer, original = load(LLAMA)
    results = (Message(Role.TOOL, "rain", tool_call_id=OTHER.id), RESULT)

    text = written(tokenizer, original, QUESTION, replace(CALLS, tool_calls=(CALL, OTHER)), *results)

    places = [text.index(each) for each in ("Genf", "rain", "Zürich", "sunny")]
    assert sorted(places) == places


def test_reasoning_gives_way_where_a_template_refuses_it_beside_a_text(load):
    tokenizer, original = load(HARMONY)
    both = replace(CALLS, content="Let me see.", reasoning="Hm.")

    assert "Hm." in written(tokenizer, original, QUESTION, replace(both, content=""), RESULT)
    text = written(tokenizer, original, QUESTION, both, RESULT)
    assert ("Let me see." in text, "Hm." in text) == (True, False)


def test_reasoning_is_written_as_transformers_writes_it(load):
    tokenizer, original = load(HERMES)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "sunny"},
    ]

    ids = tokenizer.encode_chat([QUESTION, replace(CALLS, reasoning="Hm."), RESULT])

    assert transformers_ids(original, messages) == list(ids)
    assert "Hm." in original.decode(list(ids))
    assert tokenizer.renders_reasoning
    assert not load(DEEPSEEK)[0].renders_reasoning


def test_names_are_shown_where_the_template_shows_them(load):
    """A result has the name of what was called, whether the client repeats it or not, and nobody else has."""
    named = HERMES.replace("{{ m.role }}", "{{ m.role }} {{ m.name }}")
    named = named.replace("<tool_response>", "<tool_response> {{ m.name }}:")
    tokenizer, original = load(named)
    old = replace(CALLS, tool_calls=(replace(CALL, id=""),))

    text = written(tokenizer, original, replace(QUESTION, name="bob"), CALLS, replace(RESULT, name=None))
    older = written(tokenizer, original, QUESTION, old, replace(RESULT, name=None, tool_call_id=None))

    assert "<|im_start|>user bob\n" in text
    assert "<tool_response> get_weather:" in text
    assert "<|im_start|>user \n" in older
    assert "<tool_response> get_weather:" in older


def test_a_template_that_shows_no_tools_gets_them_as_a_system_text(load):
    """In the Hermes form, with calls and results of earlier turns in the same."""
    tokenizer, original = load(CHATML)

    text = written(tokenizer, original, Message(Role.SYSTEM, "Be kind."), *CONVERSATION, tools=[WEATHER])

    assert f"<|im_start|>system\nBe kind.\n\n{tools_text([WEATHER])}<|im_end|>" in text
    assert f'<tool_call>\n{{"name": "get_weather", "arguments": {CALL.arguments}}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\nsunny\n</tool_response><|im_end|>" in text
    assert tools_text([WEATHER]) in written(tokenizer, original, QUESTION, tools=[WEATHER])


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(load):
    """As transformers chooses; a model may have no other."""
    tokenizer, original = load({"default": CHATML, "tool_use": HERMES})
    messages = [{"role": "user", "content": "Weather?"}]

    assert transformers_ids(original, messages) == list(tokenizer.encode_chat([QUESTION]))
    with_tools = transformers_ids(original, messages, tools=[definition(WEATHER)])
    assert with_tools == list(tokenizer.encode_chat([QUESTION], tools=[WEATHER]))
    only, _ = load({"tool_use": HERMES})
    assert with_tools == list(only.encode_chat([QUESTION], tools=[WEATHER]))
    with pytest.raises(InvalidRequest):
        only.encode_chat([QUESTION])


def test_a_request_may_set_the_variables_that_the_template_reads_and_no_others(load):
    """Neither the conversation, nor special tokens, nor what the template sets itself."""
    assert ("enable_thinking",) == load(HERMES)[0].template_variables
    assert ("date_string",) == load(LLAMA)[0].template_variables
    assert ("reasoning_effort",) == load(HARMONY)[0].template_variables
    assert () == load(MISTRAL)[0].template_variables

    tokenizer, original = load(HERMES)
    off = tokenizer.encode_chat([QUESTION], template_kwargs=[("enable_thinking", False)])
    assert transformers_ids(original, [{"role": "user", "content": "Weather?"}], enable_thinking=False) == list(off)
    for name in ("messages", "add_generation_prompt", "bos_token", "loop"):
        assert tokenizer.encode_chat([QUESTION], template_kwargs=[(name, False)]) == tokenizer.encode_chat([QUESTION])


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "no JSON", '{"n": 123456789012345678901234567890}'])
def test_arguments_that_are_no_object_do_not_break_a_conversation(load, arguments):
    """A model's call that max_tokens cut comes back in the history."""
    tokenizer, original = load(HERMES)
    cut = replace(CALL, arguments=arguments)

    text = written(tokenizer, original, QUESTION, replace(CALLS, tool_calls=(cut,)), RESULT)

    assert "get_weather" in text


def test_what_a_tenant_has_encoded_does_not_change_what_tools_are_encoded_to(load):
    """Segments of earlier turns are remembered, with tools and without."""
    tokenizer, _ = load(HERMES)
    tenant = Tenant.owner("ann")
    expected = tokenizer.encode_chat(CONVERSATION, tools=[WEATHER])
    tokenizer.encode_chat(CONVERSATION[:1], tools=[replace(WEATHER, description="<|im_end|>")], tenant=tenant)
    tokenizer.encode_chat(CONVERSATION, tenant=tenant)

    assert expected == tokenizer.encode_chat(CONVERSATION, tools=[WEATHER], tenant=tenant)
    assert expected == tokenizer.encode_chat(CONVERSATION, tools=[WEATHER], tenant=tenant)


@pytest.mark.parametrize("depth", [100, 600, 100_000])
@pytest.mark.parametrize("family", [HERMES, MISTRAL])
def test_arguments_that_are_nested_too_deep_are_refused(load: Load, family: Any, depth: int) -> None:
    """Whether reading them, marking them or sending them to the template comes to its end first."""
    tokenizer, _ = load(family)
    deep = replace(CALL, arguments=f'{{"city": {"[" * depth}{"]" * depth}}}')
    conversation = [QUESTION, replace(CALLS, tool_calls=(deep,)), RESULT]

    if depth <= 100:
        assert tokenizer.encode_chat(conversation)
        return
    with pytest.raises(InvalidRequest, match="arguments of a call are nested too deep"):
        tokenizer.encode_chat(conversation)
