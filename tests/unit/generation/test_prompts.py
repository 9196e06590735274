"""The prompt templates, read from files, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.engine.echo import EchoEngine
from app.errors import ConfigError
from app.events import collect
from app.generation.prompts import read_template
from app.langchain.chains import COMPLETION_VARIABLES, SYSTEM_VARIABLES
from app.types import Message, Role
from tests.unit.generation.services import ANNA, chat, complete, serving

PROMPTS = Path(__file__).parents[3] / "prompts"


class RecordingEngine(EchoEngine):
    """Echoes, and records the prompts that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[tuple[int, ...] | None] = []

    def stream(self, request: Any) -> Any:
        self.prompts.append(request.prompt_ids)
        return super().stream(request)


async def encoded(engine: EchoEngine, *messages: Message) -> tuple[int, ...]:
    return engine.tokenizer.encode_chat(messages)


def write(folder: Path, text: str, *, name: str = "base_system", model: str = "") -> None:
    path = folder / model / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_variables_are_left_to_the_chain_and_double_braces_to_it_too(tmp_path: Path) -> None:
    """A template is returned as it was written, without the line break at its end."""
    write(tmp_path, "You are {model_name}, not {{model_name}}.\n")

    assert "You are {model_name}, not {{model_name}}." == read_template(tmp_path, "base_system", SYSTEM_VARIABLES)


def test_the_template_of_a_model_stands_before_the_one_of_all(tmp_path: Path) -> None:
    """By the model's name, with -- for a slash; another model, and one without a file, has the common one."""
    write(tmp_path, "common")
    write(tmp_path, "tiny's", model="tiny")
    write(tmp_path, "org's tiny", model="org--tiny")
    write(tmp_path, "for completions", name="completion", model="other")

    texts = [
        read_template(tmp_path, "base_system", SYSTEM_VARIABLES, model=model)
        for model in ("tiny", "org/tiny", "other", "", "../tiny")
    ]

    assert ["tiny's", "org's tiny", "common", "common", "common"] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Hello {nobody}", "unknown variable nobody; known: model_name"),
        (b"Hello {model_name.__class__}", "unknown variable model_name.__class__"),
        (b"Hello {model_name:{nobody}}", "unknown variable nobody"),
        (b"Hello {0}", "unknown variable 0"),
        (b"Hello {", "write {{ and }} for plain braces"),
        (b"  \n", "the file is empty"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (None, "cannot be read"),
    ],
)
@pytest.mark.parametrize("model", ["", "tiny"])
def test_a_template_that_cannot_be_used_ends_the_start(
    tmp_path: Path, content: bytes | None, message: str, model: str
) -> None:
    """The message names the file and the reason; a model's own template has the same rules."""
    folder = tmp_path / model
    folder.mkdir(exist_ok=True)
    if content is not None:
        (folder / "system.txt").write_bytes(content)

    with pytest.raises(ConfigError, match=r"system\.txt") as refused:
        read_template(tmp_path, "system", SYSTEM_VARIABLES, model=model)

    assert message in str(refused.value)


def test_the_templates_that_come_with_the_service_can_be_used() -> None:
    """The completion template changes nothing of a prompt."""
    assert "{model_name}" in read_template(PROMPTS, "base_system", SYSTEM_VARIABLES, model="tiny-chat")
    assert "" == read_template(PROMPTS, "base_system", SYSTEM_VARIABLES, may_be_empty=True)
    assert "{prompt}" == read_template(PROMPTS, "completion", COMPLETION_VARIABLES)


async def test_a_system_prompt_stands_in_front_of_a_chat(tmp_path: Path) -> None:
    """With its variables filled in; the caller's own takes its place."""
    write(tmp_path, "You are {model_name} {{not me}}.")
    engine = RecordingEngine()
    async with serving(engine, system=read_template(tmp_path, "base_system", SYSTEM_VARIABLES)) as service:
        await service.read(chat("hi"))
        await service.read(chat("hi", system="Be brief. {model_name}"))

    user = Message(Role.USER, "hi")
    assert [
        await encoded(engine, Message(Role.SYSTEM, "You are echo {not me}."), user),
        await encoded(engine, Message(Role.SYSTEM, "Be brief. {model_name}"), user),
    ] == engine.prompts


async def test_an_empty_system_text_means_that_there_is_none() -> None:
    """The caller's own takes the place of the model's whatever it says, and wherever it stands."""
    engine = RecordingEngine()
    user, empty = Message(Role.USER, "hi"), Message(Role.SYSTEM, "")
    async with serving(engine, system="be kind") as service:
        await service.read(chat("hi"))
        await service.read(chat("hi", system=""))
        await service.read(structs.replace(chat("hi"), messages=(user, empty, user)))

    assert [
        await encoded(engine, Message(Role.SYSTEM, "be kind"), user),
        await encoded(engine, empty, user),
        await encoded(engine, user, empty, user),
    ] == engine.prompts


async def test_an_operator_may_have_no_system_text(tmp_path: Path) -> None:
    """An empty file says so, for all models or for one; a chat is then what the caller sent."""
    write(tmp_path, "common")
    write(tmp_path, " \n", model="tiny")
    engine = RecordingEngine()
    system = read_template(tmp_path, "base_system", SYSTEM_VARIABLES, model="tiny", may_be_empty=True)
    async with serving(engine, system=system) as service:
        await service.read(chat("hi"))

    assert [await encoded(engine, Message(Role.USER, "hi"))] == engine.prompts


async def test_system_messages_stay_where_the_caller_put_them() -> None:
    """Between other messages too; what the template does not take there, its tokenizer moves."""
    engine = RecordingEngine()
    said = [(Role.SYSTEM, "a"), (Role.SYSTEM, "b"), (Role.USER, "c"), (Role.ASSISTANT, "d"), (Role.SYSTEM, "e")]
    messages = tuple(Message(role, text) for role, text in [*said, (Role.USER, "f")])
    async with serving(engine, system="be kind") as service:
        await service.read(structs.replace(chat("hi"), messages=messages))

    assert [await encoded(engine, *messages)] == engine.prompts


async def test_in_a_session_system_messages_stand_around_the_stored_turns_as_around_those_that_are_sent() -> None:
    """None is stored; one between turns that the session has stands before them, a later one behind."""
    engine = RecordingEngine()
    first, answer, second = Message(Role.USER, "hi"), Message(Role.ASSISTANT, "hi"), Message(Role.USER, "ho")
    a, b, c = (Message(Role.SYSTEM, text) for text in "abc")
    async with serving(engine) as service:
        for messages in ((first,), (a, first, b, answer, c, second)):
            await service.read(structs.replace(chat("hi", session_id="s"), messages=messages))
        turns = await service.turns(ANNA.tenant, "s")

    assert await encoded(engine, a, b, first, answer, c, second) == engine.prompts[1]
    assert [["hi", "hi"], ["ho", "ho"]] == turns


async def test_a_completion_template_changes_what_the_model_sees_and_not_what_is_reported() -> None:
    """The caller's prompt is reported as it was sent; its tokens are those of the whole."""
    engine = RecordingEngine()
    async with serving(engine, completion="<{model_name}: {prompt}>") as service:
        response = await collect(service.generate(complete("hello")))

    assert ("hello", "<echo: hello>") == (response.prompt, response.text)
    assert len("<echo: hello>") == response.finished.usage.prompt_tokens
    assert [tuple(map(ord, "<echo: hello>"))] == engine.prompts
    assert ["hello"] == [record.prompt for record in service.log.records]


async def test_a_prompt_of_tokens_is_not_put_into_the_template() -> None:
    """Who sends tokens has decided on each of them."""
    engine = RecordingEngine()
    async with serving(engine, completion="<{prompt}>") as service:
        await service.read(complete((104, 105)))

    assert [(104, 105)] == engine.prompts


@pytest.mark.parametrize("text", ["{prompt}", "{nobody}", "{{", "{0.__class__}", "{model_name!r:>99}", "{% x %}"])
async def test_braces_in_a_users_text_are_data(text: str) -> None:
    """In a prompt, a message and a system text: none of them is ever read as a template."""
    engine = RecordingEngine()
    async with serving(engine, completion="<{prompt}>", system="{{{model_name}}}") as service:
        await service.read(complete(text))
        await service.read(chat(text))
        await service.read(chat(text, system=text))

    user = Message(Role.USER, text)
    assert [
        tuple(map(ord, f"<{text}>")),
        await encoded(engine, Message(Role.SYSTEM, "{echo}"), user),
        await encoded(engine, Message(Role.SYSTEM, text), user),
    ] == engine.prompts


def test_a_model_whose_name_is_too_long_for_a_folder_has_the_usual_prompt():
    usual = read_template(PROMPTS, "completion", COMPLETION_VARIABLES)

    assert usual == read_template(PROMPTS, "completion", COMPLETION_VARIABLES, model="a" * 300)
