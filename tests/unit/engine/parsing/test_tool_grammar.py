"""What the sampler is held to accepts what the templates write, and nothing else."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from msgspec import structs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from app.engine.base import Capabilities, ChatFormat, EngineInfo
from app.engine.parsing.formats import marks_of
from app.engine.parsing.tool_grammar import with_grammar
from app.errors import InvalidRequest
from app.requests import GenerationRequest
from app.types import Grammar, Message, Role, SamplingParams, Tool, ToolChoice
from tests.unit.engine.parsing.conversations import TOOLS
from tests.unit.engine.scripted import make_request

CALLS = {
    "hermes": (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>'
        '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par\\"is"}}\n</tool_call>',
    ),
    "qwen_xml": (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>\n</function>\n"
        "</tool_call>",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa\nris\n</parameter>\n<parameter=unit>\nc\n"
        "</parameter>\n</function>\n</tool_call>",
    ),
    "llama": (
        '{"name": "add", "parameters": {"a": 1, "b": 2.5}}',
        '{"name": "add", "parameters": {"a": 1, "b": 2.5}}; {"name": "get_weather", "parameters": {"city": "Paris"}}',
    ),
    "mistral": (
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2.5}}]',
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2.5}}, '
        '{"name": "get_weather", "arguments": {"city": "Paris"}}]',
    ),
    "mistral_args": (
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2.5}',
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2.5}[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1, "b": 2.5}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1, "b": 2.5}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n'
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "deepseek_v31": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2.5}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2.5}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "gemma4": (
        "<|tool_call>call:add{a:1,b:2.5}<tool_call|>",
        '<|tool_call>call:add{a:1,b:2.5}<tool_call|><|tool_call>call:get_weather{city:<|"|>Pa{r}is<|"|>,unit:<|"|>c<|"|>}<tool_call|>',
    ),
    "function_gemma": (
        "<start_function_call>call:add{a:1,b:2.5}<end_function_call>",
        "<start_function_call>call:add{a:1,b:2.5}<end_function_call>"
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
    ),
    "phi": (
        '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2.5}}]<|/tool_call|>',
        '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": 2.5}}, '
        '{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>',
    ),
    "harmony": (
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2.5}',
        "",
    ),
}
"""One call of each family, and two; harmony has one in a completion."""
THOUGHTS = {
    "think": "<think>\nab\n</think>\n\n",
    "mistral": "[THINK]ab[/THINK]",
    "gemma4": "<|channel>thought\nab<channel|>",
}
ANSWER = Grammar("json_schema", '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}')
formats = pytest.mark.parametrize("name", CALLS)
kinds = pytest.mark.parametrize("special", [True, False, None], ids=["special", "added", "text"])


def chat_of(name: str | None, reasoning: str | None, special: bool | None) -> tuple[Tokenizer, ChatFormat]:
    """Return a byte-level tokenizer and a format whose marks are special tokens, added ones, or (None) text."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    marks = marks_of(name, reasoning)
    if special is not None:
        tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    ids = tuple((mark, number) for mark in marks if (number := tokenizer.token_to_id(mark)) is not None)
    return tokenizer, ChatFormat(
        tools=name, reasoning=reasoning, special_marks=ids if special else (), added_marks=() if special else ids
    )


def grammar_of(
    chat: ChatFormat, *, tools: Sequence[Tool] = TOOLS, own: Grammar | None = None, inside: bool = False, **fields: Any
) -> Grammar | None:
    """Return the grammar that a chat's completion is held to."""
    request = make_request(
        "1",
        messages=(Message(Role.USER, "Hello"),),
        tools=tuple(tools),
        sampling=SamplingParams(grammar=own),
        **fields,
    )
    return with_grammar(request, info_of(chat), inside=inside).sampling.grammar


def info_of(chat: ChatFormat, *unsupported: str) -> EngineInfo:
    return EngineInfo(
        model="m",
        engine="batching",
        context_length=100,
        chat_format=chat,
        capabilities=Capabilities(unsupported=unsupported),
    )


def accepts(tokenizer: Tokenizer, grammar: Grammar | None, text: str) -> bool:
    """Return whether a whole completion follows a grammar."""
    assert grammar is not None
    assert "lark" == grammar.kind
    eos = tokenizer.token_to_id("<eos>")
    matcher = LLMatcher(
        LLTokenizer(tokenizer.to_str(), eos_token=eos), LLMatcher.grammar_from_lark(grammar.text), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def two_of(name: str) -> str:
    """Return two calls of a family; harmony has no more than one."""
    return CALLS[name][1] or CALLS[name][0]


def broken(text: str) -> str:
    """Return a call with arguments that the schema has not."""
    for key, other in (('"a"', '"z"'), ("=a>", "=z>"), ("{a:", "{z:")):
        text = text.replace(key, other)
    return text


def final(name: str, text: str) -> str:
    return f"<|channel|>final<|message|>{text}" if name == "harmony" else text


@formats
@kinds
def test_required_calls_are_those_of_the_family_and_follow_the_schema(name: str, special: bool | None):
    """One call and several are accepted; no text, no other argument, no other tool."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, special)

    grammar = grammar_of(chat, tool_choice=ToolChoice("required"))

    assert accepts(tokenizer, grammar, CALLS[name][0])
    assert accepts(tokenizer, grammar, two_of(name))
    assert not accepts(tokenizer, grammar, broken(CALLS[name][0]))
    assert not accepts(tokenizer, grammar, CALLS[name][0].replace("add", "nope"))
    assert not accepts(tokenizer, grammar, final(name, "Hello"))
    assert not accepts(tokenizer, grammar, "")


@formats
def test_a_named_tool_is_the_only_one(name: str):
    """Another tool of the request may not be called."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, True)

    weather = grammar_of(chat, tool_choice=ToolChoice("required", "get_weather"))

    assert not accepts(tokenizer, weather, CALLS[name][0])
    assert accepts(tokenizer, grammar_of(chat, tool_choice=ToolChoice("required", "add")), CALLS[name][0])


@formats
@kinds
def test_without_parallel_calls_there_is_one(name: str, special: bool | None):
    """`parallel_tool_calls: false` allows no second call."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, special)

    grammar = grammar_of(chat, tool_choice=ToolChoice("required"), parallel_tool_calls=False)

    assert accepts(tokenizer, grammar, CALLS[name][0])
    if two_of(name) != CALLS[name][0]:
        assert not accepts(tokenizer, grammar, two_of(name))


@formats
@kinds
def test_a_strict_tool_may_be_called_and_only_rightly(name: str, special: bool | None):
    """With tool_choice auto any text is free until it calls."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, special)

    grammar = grammar_of(chat, tools=[replace(tool, strict=True) for tool in TOOLS])

    assert accepts(tokenizer, grammar, final(name, "Hello, you"))
    assert accepts(tokenizer, grammar, two_of(name))
    assert not accepts(tokenizer, grammar, broken(CALLS[name][0]))
    if name not in ("llama", "harmony"):
        assert accepts(tokenizer, grammar, "Well.\n" + CALLS[name][0])


@kinds
def test_llamas_tag_may_stand_behind_text(special: bool | None):
    """What begins like a call has to be one; behind the tag there has to be one."""
    tokenizer, chat = chat_of("llama", None, special)

    grammar = grammar_of(chat, tools=[replace(tool, strict=True) for tool in TOOLS])

    assert accepts(tokenizer, grammar, "Well <|python_tag|>" + CALLS["llama"][0])
    assert not accepts(tokenizer, grammar, '{"x": 1}')


@pytest.mark.parametrize("name", ["hermes", "mistral", "gemma4", "llama"])
@pytest.mark.parametrize("reasoning", THOUGHTS)
@kinds
def test_thoughts_stand_before_what_is_enforced(name: str, reasoning: str, special: bool | None):
    """With or without them, or begun by the prompt, calls and the client's format are enforced behind them."""
    tokenizer, chat = chat_of(name, reasoning, special)
    thought = THOUGHTS[reasoning]
    inner = thought[thought.index("ab") :]

    calls = grammar_of(chat, tool_choice=ToolChoice("required"))
    inside = grammar_of(chat, tool_choice=ToolChoice("required"), inside=True)
    answer = grammar_of(chat, tools=[], own=ANSWER)

    assert accepts(tokenizer, calls, thought + CALLS[name][0])
    assert accepts(tokenizer, calls, CALLS[name][0])
    assert accepts(tokenizer, inside, inner + CALLS[name][0])
    assert not accepts(tokenizer, inside, CALLS[name][0])
    assert not accepts(tokenizer, calls, thought + "Hello")
    assert accepts(tokenizer, answer, thought + '{"x": 1}')
    assert not accepts(tokenizer, answer, thought + '{"x": "1"}')


@formats
def test_a_response_format_beside_tools_is_for_what_is_no_call(name: str):
    """The completion is either calls or what the format describes; required calls leave no place for it."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, True)
    call = ("<|python_tag|>" if name == "llama" else "") + CALLS[name][0]

    grammar = grammar_of(chat, own=ANSWER)
    required = grammar_of(chat, own=ANSWER, tool_choice=ToolChoice("required"))

    assert accepts(tokenizer, grammar, call)
    assert accepts(tokenizer, grammar, final(name, '{"x": 1}'))
    assert not accepts(tokenizer, grammar, final(name, "Hello"))
    assert not accepts(tokenizer, required, final(name, '{"x": 1}'))


@pytest.mark.parametrize(
    ("own", "good", "bad"),
    [
        (Grammar("regex", r"a/b\/c|[0-9]+"), "a/b/c", "ab"),
        (Grammar("lark", 'start: "start" start2\nstart2: /[0-9]+/ | "-" start'), "start-start12", "12"),
        (ANSWER, '{"x": 1}', "1"),
    ],
)
def test_every_kind_of_a_clients_grammar_stands_behind_the_thoughts(own: Grammar, good: str, bad: str):
    """A regular expression and a grammar of the client's too."""
    tokenizer, chat = chat_of(None, "think", True)

    grammar = grammar_of(chat, tools=[], own=own)

    assert accepts(tokenizer, grammar, "<think>q</think>" + good)
    assert accepts(tokenizer, grammar, good)
    assert not accepts(tokenizer, grammar, "<think>q</think>" + bad)


def test_harmonys_answer_follows_the_response_format():
    """Its thoughts are free, and the final message is what the format describes."""
    tokenizer, chat = chat_of(None, "harmony", True)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"

    grammar = grammar_of(chat, tools=[], own=ANSWER)

    assert accepts(tokenizer, grammar, f'{thought}<|channel|>final<|message|>{{"x": 1}}')
    assert not accepts(tokenizer, grammar, f'{thought}<|channel|>final<|message|>{{"y": 1}}')


def test_what_needs_no_grammar_is_not_constrained():
    """Tools that are not strict, none at all, and a client's grammar where the model neither thinks nor calls."""
    chat = ChatFormat(tools="hermes")

    assert grammar_of(chat) is None
    assert grammar_of(chat, tool_choice=ToolChoice("none"), tools=[replace(TOOLS[0], strict=True)]) is None
    assert ANSWER == grammar_of(chat, tools=[], own=ANSWER)


NESTED = {
    "type": "object",
    "properties": {
        "who": {"$ref": "#/$defs/person"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "at": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "kind": {"enum": ["a", 1, None]},
        "extra": {},
    },
    "required": ["who", "at"],
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "child": {"$ref": "#/$defs/person"}},
            "required": ["name"],
        }
    },
}


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        ("{who:{name:'Ann'},at:1}", True),
        ("{who:{name:'Ann',child:{name:'Bob'}},tags:['x','y'],at:null,kind:'a',extra:[1,{z:true}]}", True),
        ("{who:{name:'Ann'},tags:[],at:-12,kind:1}", True),
        ("{who:{name:'Ann'}}", False),
        ("{who:{child:{name:'Bob'}},at:1}", False),
        ("{who:{name:'Ann'},at:1.5}", False),
        ("{who:{name:'Ann'},at:1,kind:'b'}", False),
        ("{at:1}", False),
    ],
)
@kinds
def test_gemmas_arguments_follow_the_schema(arguments: str, good: bool, special: bool | None):
    """Its form is no JSON, so that a grammar of its own knows references, unions, lists and what is required."""
    tokenizer, chat = chat_of("gemma4", None, special)
    tool = Tool("f", parameters=json.dumps(NESTED))

    grammar = grammar_of(chat, tools=[tool], tool_choice=ToolChoice("required"))

    call = f"<|tool_call>call:f{arguments}<tool_call|>".replace("'", '<|"|>')
    assert good == accepts(tokenizer, grammar, call)


@pytest.mark.parametrize("name", ["hermes", "qwen_xml"])
def test_references_are_those_of_the_tools_schema(name: str):
    """A schema stands in the grammar as a whole, also where only one of its properties does."""
    tokenizer, chat = chat_of(name, None, True)
    schema = {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "$defs": {"n": {"type": "integer"}}}
    tool = Tool("f", parameters=json.dumps(schema))
    calls = {
        "hermes": '<tool_call>\n{"name": "f", "arguments": {"n": VALUE}}\n</tool_call>',
        "qwen_xml": "<tool_call>\n<function=f>\n<parameter=n>\nVALUE\n</parameter>\n</function>\n</tool_call>",
    }

    grammar = grammar_of(chat, tools=[tool], tool_choice=ToolChoice("required"))

    assert accepts(tokenizer, grammar, calls[name].replace("VALUE", "12"))
    assert not accepts(tokenizer, grammar, calls[name].replace("VALUE", '"x"'))


def test_keywords_that_are_not_known_are_left_out_unless_the_tool_is_strict():
    """Clients' schemas hold what nobody enforces; a strict tool is enforced wholly or refused."""
    tokenizer, chat = chat_of("hermes", None, True)
    tool = Tool("f", parameters='{"type": "object", "properties": {"a": {"type": "string", "format": "regex"}}}')
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "red"}}\n</tool_call>'

    assert accepts(tokenizer, grammar_of(chat, tools=[tool], tool_choice=ToolChoice("required")), call)
    with pytest.raises(InvalidRequest, match="tools have a schema that uses the `format` regex"):
        grammar_of(chat, tools=[replace(tool, strict=True)])


@pytest.mark.parametrize("parameters", ["{}", "true", "[]", '{"type": "object", "properties": null}'])
@formats
def test_a_tool_without_parameters_takes_any_object(name: str, parameters: str):
    """Whatever stands for no schema makes no invalid grammar."""
    tokenizer, chat = chat_of(name, "harmony" if name == "harmony" else None, True)
    call = CALLS[name][0].replace("<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>\n", "")

    grammar = grammar_of(chat, tools=[Tool("add", parameters=parameters)], tool_choice=ToolChoice("required"))

    assert accepts(tokenizer, grammar, call)


@pytest.mark.parametrize(
    ("chat", "unsupported", "fields", "field"),
    [
        (ChatFormat(tools="hermes"), ("grammar",), {"tool_choice": ToolChoice("required")}, "tool_choice"),
        (ChatFormat(), (), {"tool_choice": ToolChoice("required", "add")}, "tool_choice"),
        (ChatFormat(tools="hermes"), ("grammar",), {"tools": (replace(TOOLS[0], strict=True),)}, "tools"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    chat: ChatFormat, unsupported: tuple[str, ...], fields: dict[str, Any], field: str
):
    """A model without grammars, or without a form of calls, is not asked to be held to one."""
    request: GenerationRequest = structs.replace(
        make_request("1", messages=(Message(Role.USER, "Hello"),), tools=TOOLS), **fields
    )

    with pytest.raises(InvalidRequest, match="is not supported for this model") as refusal:
        with_grammar(request, info_of(chat, *unsupported), inside=False)

    assert field in str(refusal.value) or field in str(refusal.value.details)


def nested(depth: int) -> Tool:
    deep = '{"anyOf": [{"properties": {"a": ' * depth + "{}" + "}}]}" * depth
    return Tool("add", parameters=f'{{"properties": {{"a": {deep}}}}}')


@formats
def test_a_schema_that_goes_too_deep_is_refused(name: str):
    """A client cannot make the service run out of stack."""
    _, chat = chat_of(name, "harmony" if name == "harmony" else None, True)

    assert grammar_of(chat, tools=[nested(100)], tool_choice=ToolChoice("required")) is not None
    with pytest.raises(InvalidRequest, match="tools have a schema that is nested too deeply"):
        grammar_of(chat, tools=[nested(5000)], tool_choice=ToolChoice("required"))


OTHER_KINDS: tuple[Any, ...] = (5, -1.5, True, None, "x", [], [1], [[]], {}, {"a": 1})
"""Values, of which at most one or two are what a keyword of JSON Schema may have."""
KEYWORDS = ("required", "properties", "type", "enum", "const", "format", "allOf", "anyOf", "items", "$ref", "$defs")


@formats
def test_keywords_of_another_kind_than_they_should_be_break_nothing(name: str):
    """Wherever they stand: a schema is refused, or what cannot be meant is not enforced."""
    _, chat = chat_of(name, "harmony" if name == "harmony" else None, True)
    refused = set[str]()
    for keyword, value, strict in product(KEYWORDS, OTHER_KINDS, (False, True)):
        inner = {"type": "string", "minProperties": 1, keyword: value}
        for schema in (
            {"properties": {"a": {}}, "minProperties": 1, keyword: value},
            {"properties": {"a": inner, "b": {"format": "date", keyword: value}, "c": value}},
        ):
            tool = Tool("add", parameters=json.dumps(schema), strict=strict)
            try:
                grammar_of(chat, tools=[tool], tool_choice=ToolChoice("required"))
            except InvalidRequest as error:
                refused.add(str(error))

    assert all("tools" in each for each in refused)
