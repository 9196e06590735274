"""Whatever a chat template does takes a bounded time and memory, and only the conversation that asked for it pays."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer import chat_template
from app.engine.tokenizer.chat_template import ChatTemplate, TemplateExhaustedError, TemplateRefusedError
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.errors import InvalidRequest
from app.types import Message, Role
from tests.unit.tiny_models import CHATML, chatml_tokenizer, save

HELLO = [{"role": "user", "content": "hello"}]
FOREVER = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
EXHAUSTING = {
    "loop": FOREVER,
    "recursion that branches": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "string product": "{{ ('a' * 100000) * messages[0].content|length * 100000 }}",
    "strings that double": (
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "lists that double": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}"
    ),
    "power": "{{ 10 ** (10 ** (8 + messages|length)) }}",
    "long output": "{% for i in range(9000) %}{{ 'a' * 9000 }}{% endfor %}",
    "width": "{{ '%999999999d' % messages|length }}",
    "filter": "{{ messages[0].content | center(999999999) }}",
}
REFUSING = {
    "division": "{{ 1 / (messages|length - 1) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "exception": "{{ raise_exception('no') }}",
    "missing": "{{ messages[7].content.x }}",
    "file": "{% include '/etc/passwd' %}",
    "internals": "{{ messages.__class__.__mro__ }}",
    "half of a character": "{{ '%c' % 0xD800 }}",
}


@pytest.fixture
def compiled() -> Iterator[Callable[[str], ChatTemplate]]:
    """Compiles templates with a short limit, and ends their processes after the test."""
    started: list[ChatTemplate] = []

    def compile_template(source: str, cpu_seconds: float = 0.3) -> ChatTemplate:
        started.append(ChatTemplate(source, {"bos_token": "<s>"}, cpu_seconds=cpu_seconds))
        return started[-1]

    yield compile_template
    for each in started:
        each.close()


@pytest.mark.parametrize("source", EXHAUSTING.values(), ids=EXHAUSTING)
def test_a_template_that_takes_too_much_is_stopped(compiled: Callable[[str], ChatTemplate], source: str):
    """On one user's word, too: the conversations before and after it are rendered as ever."""
    template = compiled("{% if messages[0].role == 'user' %}" + source + "{% else %}fine{% endif %}")
    started = time.monotonic()

    with pytest.raises(TemplateExhaustedError):
        template.render(HELLO)

    assert "fine" == template.render([{"role": "system", "content": "x"}])
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("source", REFUSING.values(), ids=REFUSING)
def test_a_template_that_fails_refuses_the_conversation(compiled: Callable[[str], ChatTemplate], source: str):
    """The process is not harmed and goes on."""
    template = compiled("{% if messages[0].role == 'user' %}" + source + "{% else %}fine{% endif %}")

    with pytest.raises(TemplateRefusedError):
        template.render(HELLO)

    assert "fine" == template.render([{"role": "system", "content": "x"}])


def test_a_process_that_does_not_read_is_given_up_at_the_deadline(
    compiled: Callable[[str], ChatTemplate], monkeypatch: pytest.MonkeyPatch
):
    """However long the conversation is; the next one gets a new process."""
    monkeypatch.setattr(chat_template, "ANSWER_SECONDS", 0.5)
    before = set(psutil.Process().children())
    template = compiled("{{ messages[0].content }}")
    (process,) = set(psutil.Process().children()) - before
    process.suspend()
    outcomes: list[BaseException] = []

    def render() -> None:
        try:
            template.render([{"role": "user", "content": "x" * 1_000_000}])
        except TemplateExhaustedError as error:
            outcomes.append(error)

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(60)
    with suppress(psutil.NoSuchProcess):
        process.kill()

    assert 1 == len(outcomes)
    monkeypatch.undo()
    assert "fine" == template.render([{"role": "user", "content": "fine"}])


def test_others_are_rendered_while_one_is_being_stopped(compiled: Callable[[str, float], ChatTemplate]):
    """A conversation that has to be stopped takes one place of two."""
    template = compiled("{% if messages[0].content == 'bad' %}" + FOREVER + "{% endif %}fine", 2.0)
    ended: list[float] = []

    def bad() -> None:
        with pytest.raises(TemplateExhaustedError):
            template.render([{"role": "user", "content": "bad"}])
        ended.append(time.monotonic())

    thread = threading.Thread(target=bad)
    thread.start()
    time.sleep(0.2)
    texts = [template.render(HELLO) for _ in range(20)]
    others_ended = time.monotonic()
    thread.join()

    assert ["fine"] * 20 == texts
    assert others_ended < ended[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% for %}", "line 2"),
        ("{{ (10 ** (10 ** 9)) }}", "time"),
        ("{% if x", "line 1"),
        ("{% \x1b\n[31m" + "x" * 1000 + " %}", "line 1"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_refused_at_once(
    compiled: Callable[[str], ChatTemplate], source: str, reason: str
):
    """The message names the template and the reason in one line; what is constant is computed then, within limits."""
    with pytest.raises(ValueError, match=f"^chat_template: .*{reason}") as refusal:
        compiled(source)

    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 300


SHAPES = {
    "chatml": CHATML,
    "json": "{{ messages | tojson }}{{ messages[0].content | length }}"
    "{{ {'b': 'é<', 'a': [1, none]} | tojson(indent=2, sort_keys=true) }}{{ tools }}",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1)['a'] }}{{ dict.fromkeys(['a']) }}"
    "{{ messages[::-1][0].content[:3] ~ bos_token }}{{ x is defined }}",
    "blocks": "  {% if true %}\n  {{- messages[0].content }}\n  {% endif %}\n{% set c %}{{ 1 }}{% endset %}{{ c }}\n",
    "prompt": "{{ messages[0].role }}{% if add_generation_prompt %}go{% endif %}{{ documents is none }}",
}


@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("content", ["hello", "  two\nlines  "])
@pytest.mark.parametrize("continued", [False, True])
def test_a_rendering_is_what_transformers_renders(
    compiled: Callable[[str], ChatTemplate], source: str, content: str, continued: bool
):
    """Filters, globals, white space, tags, and where a message is cut that is to be continued."""
    reference: PreTrainedTokenizerFast = chatml_tokenizer(source)
    reference.bos_token = "<s>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    try:
        expected: object = reference.apply_chat_template(
            messages, tokenize=False, continue_final_message=continued, add_generation_prompt=not continued
        )
    except ValueError:
        expected = None

    try:
        rendered: object = compiled(source).render(messages, continue_final_message=continued)
    except TemplateRefusedError:
        rendered = None

    assert expected == rendered


def test_no_process_of_a_template_outlives_it(tmp_path: Path):
    """Neither when it is closed nor when nothing refers to it any more."""
    before = set(psutil.Process().children())
    closed, forgotten = (HfTokenizer(save(chatml_tokenizer(), tmp_path / name)) for name in "ab")
    started = set(psutil.Process().children()) - before
    assert 2 == len(started)

    closed.close()
    del forgotten

    assert not any(child.is_running() for child in started)


def test_a_conversation_that_its_template_cannot_bear_is_the_callers_to_change(tmp_path: Path):
    """It is refused as a request that would fail again, and the next one is encoded."""
    template = "{% if 'bomb' in messages[-1].content %}" + FOREVER + "{% endif %}" + CHATML
    tokenizer = HfTokenizer(save(chatml_tokenizer(template), tmp_path))

    with pytest.raises(InvalidRequest, match="more time or memory"):
        tokenizer.encode_chat([Message(Role.USER, "bomb")])

    assert tokenizer.encode_chat([Message(Role.USER, "hello")])
    tokenizer.close()


def test_a_template_that_fails_is_not_the_conversations_order(tmp_path: Path):
    """The message says whose fault it is, with the class of the error and no word of the conversation."""
    template = "{{ 1 / (messages[-1].content | length - 5) }}" + CHATML
    tokenizer = HfTokenizer(save(chatml_tokenizer(template), tmp_path))

    with pytest.raises(InvalidRequest, match=r"template fails on these messages \(ZeroDivisionError\)"):
        tokenizer.encode_chat([Message(Role.USER, "hello")])
    assert tokenizer.encode_chat([Message(Role.USER, "hello world")])
    tokenizer.close()


def test_several_templates_without_a_default_leave_the_plain_prompts(tmp_path: Path):
    """Chats are refused for the template's sake; everything else is served."""
    original = chatml_tokenizer()
    original.chat_template = {"chat": CHATML, "tool_use": CHATML}
    tokenizer = HfTokenizer(save(original, tmp_path))

    with pytest.raises(InvalidRequest, match=r"no default chat template, only others \(chat, tool_use\)"):
        tokenizer.encode_chat([Message(Role.USER, "hello")])
    assert tokenizer.encode_text("hello")


@pytest.mark.parametrize(
    ("template", "reason"), [(FOREVER, "time"), ("{{ 'a' * 999999999 }}", "memory"), ("{% x", "line 1")]
)
def test_a_template_that_no_conversation_gets_through_is_refused_at_load(tmp_path: Path, template: str, reason: str):
    """In one line that names it."""
    with pytest.raises(ValueError, match=f"^chat_template: .*{reason}"):
        HfTokenizer(save(chatml_tokenizer(template), tmp_path))
