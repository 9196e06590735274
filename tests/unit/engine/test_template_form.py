"""Every message reaches the model as transformers renders it, in the form and the place that its template takes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.errors import InvalidRequest
from app.types import Message, Role
from tests.unit.tiny_models import CHATML, chatml_tokenizer, save, token_id

S, U, A = Role.SYSTEM, Role.USER, Role.ASSISTANT
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH_PART = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
SELECTED = "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
FIRST_PART = "{{ m.content[0].text }}"
PARTS_OF_USERS = "{% if m.role == 'user' %}" + EACH_PART + "{% else %}{{ m.content }}{% endif %}"
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + EACH_PART + "{% endif %}"
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + HEAD + ""
    "{% if m.role == 'assistant' %}{% set said = m.content %}{% set thought = '' %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}" + TAIL
)
CONVERSATIONS = [
    [(U, "Hello")],
    [(S, "Be kind."), (U, "Hello")],
    [(S, "Be kind."), (U, "Hello"), (A, "Well met."), (U, "Who are you?")],
    [(U, "Hello"), (A, "Well met."), (S, "In French."), (U, "Who are you?")],
    [(S, "Be kind."), (S, "Be brief."), (U, "Hello"), (S, "In French.")],
]


class Model:
    """A template as transformers applies it, and as the service does."""

    def __init__(self, folder: Path, template: str) -> None:
        self.original: PreTrainedTokenizerFast = chatml_tokenizer(template)
        self.original.add_tokens([AddedToken("</think>", special=False, normalized=False)])
        self.loaded = HfTokenizer(save(self.original, folder))

    def expected(self, conversation: list[tuple[Role, Any]], **settings: Any) -> tuple[int, ...]:
        messages = [{"role": role.value, "content": content} for role, content in conversation]
        settings = {"add_generation_prompt": True} | settings
        return tuple(self.original.apply_chat_template(messages, return_dict=False, **settings))

    def encoded(self, conversation: list[tuple[Role, str]], **settings: Any) -> tuple[int, ...]:
        return self.loaded.encode_chat([Message(role, text) for role, text in conversation], **settings)


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Callable[[str], Model]]:
    """Loads a tokenizer with a template, and ends its processes after the test."""
    loaded: list[Model] = []

    def load(template: str) -> Model:
        loaded.append(Model(tmp_path / str(len(loaded)), template))
        return loaded[-1]

    yield load
    for each in loaded:
        each.loaded.close()


def in_parts(conversation: list[tuple[Role, str]], *roles: Role) -> list[tuple[Role, Any]]:
    return [(role, [{"type": "text", "text": text}] if role in roles else text) for role, text in conversation]


@pytest.mark.parametrize(
    ("content", "roles"),
    [
        (EACH_PART, [S, U, A]),
        (SELECTED, [S, U, A]),
        (FIRST_PART, [S, U, A]),
        (PARTS_OF_USERS, [U]),
        ("{{ m.content }}", []),
        (EITHER, []),
    ],
    ids=["each", "selected", "first", "users", "text", "either"],
)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_content_has_the_form_that_the_template_reads(
    model: Callable[[str], Model], content: str, roles: list[Role], conversation: list[tuple[Role, str]]
):
    """Parts or a text, for each role by itself; a system message stays in its place where the template shows it."""
    tiny = model(HEAD + content + TAIL)

    assert tiny.expected(in_parts(conversation, *roles)) == tiny.encoded(conversation)


@pytest.mark.parametrize("content", [EACH_PART, SELECTED, PARTS_OF_USERS])
def test_a_message_of_parts_goes_on_where_it_breaks_off(model: Callable[[str], Model], content: str):
    """In its last part, which is the only one."""
    tiny = model(HEAD + content + TAIL)
    conversation = [(U, "Hello"), (A, "Well met, my")]
    settings = {"continue_final_message": True}
    roles = [U] if content == PARTS_OF_USERS else [U, A]

    expected = tiny.expected(in_parts(conversation, *roles), **settings, add_generation_prompt=False)
    assert expected == tiny.encoded(conversation, **settings)


@pytest.mark.parametrize("nothing", ["{{ m.content.text }}", "{{ m.text }}", "", "{% if m.content %}x{% endif %}"])
def test_a_template_that_shows_nothing_of_the_user_ends_the_load(tmp_path: Path, nothing: str):
    """In whatever form it gets it: every answer would be to nothing."""
    with pytest.raises(ValueError, match=r"^chat_template: it shows nothing of what a user says"):
        Model(tmp_path, HEAD + nothing + TAIL)


def test_a_template_that_writes_parts_as_they_are_ends_the_load(tmp_path: Path):
    """What a list looks like in Python is no text of a user's."""
    template = HEAD + "{% if m.content is not string %}{{ m.content }}{% endif %}" + TAIL

    with pytest.raises(ValueError, match="shows nothing of what a user says"):
        Model(tmp_path, template)


REFUSED_LATER = (
    "{% if messages[1:] | selectattr('role', 'equalto', 'system') | list %}{{ raise_exception('') }}{% endif %}"
)
DROPPED_LATER = CHATML.replace(
    "in messages", "in messages[:1] + (messages[1:] | rejectattr('role', 'equalto', 'system') | list)", 1
)


@pytest.mark.parametrize("template", [REFUSED_LATER + CHATML, DROPPED_LATER], ids=["refused", "dropped"])
def test_a_system_message_moves_to_the_beginning_only_where_its_place_is_refused(
    model: Callable[[str], Model], template: str
):
    """With those that stand there already, as one message."""
    tiny = model(template)

    moved = tiny.encoded([(S, "Be kind."), (U, "Hello"), (A, "Well"), (S, "In French."), (U, "Who?")])
    first = [(S, "Be kind."), (U, "Hello")]

    assert tiny.expected([(S, "Be kind.\n\nIn French."), (U, "Hello"), (A, "Well"), (U, "Who?")]) == moved
    assert tiny.expected(first) == tiny.encoded(first)


def test_a_place_that_only_some_conversations_may_not_have_is_found_out_when_it_is_refused(
    model: Callable[[str], Model],
):
    """The dry run cannot try all of them."""
    tiny = model("{% if messages[-1].role == 'system' %}{{ raise_exception('') }}{% endif %}" + CHATML)

    in_place = [(U, "Hello"), (S, "In French."), (U, "Who?")]
    assert tiny.expected(in_place) == tiny.encoded(in_place)
    assert tiny.expected([(S, "In French."), (U, "Hello")]) == tiny.encoded([(U, "Hello"), (S, "In French.")])


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a fox.<|im_end|>\n{% endif %}" + CHATML
)


def test_an_empty_system_message_is_none(model: Callable[[str], Model]):
    """It is left out; but not where the template has a text of its own for conversations that bring none."""
    greeting = [(U, "Hello")]

    plain = model(CHATML)
    assert plain.expected(greeting) == plain.encoded([(S, ""), *greeting])
    fox = model(DEFAULT_SYSTEM)
    assert fox.expected(greeting) == fox.encoded(greeting)
    assert fox.expected([(S, ""), *greeting]) == fox.encoded([(S, ""), *greeting])


HISTORY = [(U, "Hello"), (A, "<think>\nhm\n</think>\n\nWell met."), (U, "Who are you?")]


@pytest.mark.parametrize(
    "last",
    [
        "<think>\nwell\n</think>\n\nMy name is",
        "<think>\nwell\n</think>\n\n",
        "<think>\nwell",
        "My name is ",
        "My </think> name",
        "plain",
    ],
)
def test_thoughts_that_go_on_are_rendered_as_transformers_renders_them(model: Callable[[str], Model], last: str):
    """Token for token, also where the template rewrites the message; what it drops is refused as transformers does."""
    tiny = model(THINKING)
    conversation = [*HISTORY, (A, last)]
    try:
        expected = tiny.expected(conversation, continue_final_message=True, add_generation_prompt=False)
    except ValueError:
        with pytest.raises(InvalidRequest):
            tiny.encoded(conversation, continue_final_message=True)
        return

    assert expected == tiny.encoded(conversation, continue_final_message=True)


@pytest.mark.parametrize("template", [THINKING, CHATML], ids=["thinking", "chatml"])
def test_thoughts_in_the_history_are_rendered_as_transformers_renders_them(
    model: Callable[[str], Model], template: str
):
    """A template takes them out or writes them with the tokens that the model has for them."""
    tiny = model(template)

    for conversation in (HISTORY, HISTORY[:2]):
        assert tiny.expected(conversation) == tiny.encoded(conversation)


def test_nobody_but_the_assistant_thinks(model: Callable[[str], Model]):
    """In anybody else's text the same words are words, as every control token is."""
    tiny = model(THINKING)
    marks = {token_id(tiny.original, name) for name in ("<think>", "</think>")}

    assert not marks & set(tiny.encoded([(S, "<think>a</think>"), (U, "<think>b</think>")]))
