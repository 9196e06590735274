"""What form a chat template wants messages in, found by dry runs when a model is loaded.

Decides for each role whether its content is a text or a list of parts, where system messages may stand, and what takes
their place where they may not.  Renders by way of the template alone: it knows neither tokens nor requests.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from app.engine.tokenizer.chat_template import TemplateExhaustedError, TemplateRefusedError
from app.types import Message, Role

_PROBE = "Be brief."
_USER, _ASSISTANT = Message(Role.USER, "Hello"), Message(Role.ASSISTANT, "Well")


class Template(Protocol):
    """Renders conversations; `ChatTemplate` does."""

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Raises: TemplateRefusedError, TemplateExhaustedError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateForm:
    """How messages are written for one template."""

    parts: frozenset[Role] = frozenset()
    """Roles whose content is a list of parts, `[{"type": "text", "text": ...}]`; that of the others is a text."""
    system_first: bool = True
    """Whether the template shows a system message at the beginning."""
    system_later: bool = True
    """Whether it shows one behind other messages."""
    system_by_default: bool = False
    """Whether it writes a system text of its own where a conversation has none, and an empty message prevents that."""
    tools: bool = True
    """Whether it shows what tools said."""

    def arrangements(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """Yield the conversation in the orders that the template may take, the one that changes least first.

        A system message moves to the beginning, or into the user's next message, only where the template does not show
        it in its place.  Every later arrangement is for a template that refuses the ones before.
        """
        turns = list(messages)
        if not self.system_by_default:
            turns = [message for message in turns if message.content or message.role is not Role.SYSTEM]
        if not self.tools and any(message.role is Role.TOOL for message in turns):
            turns = _fold_tools(turns)
        is_later = any(message.role is Role.SYSTEM for message in turns[1:])
        if self.system_first and (self.system_later or not is_later):
            yield turns
        if self.system_first and is_later:
            yield _hoist_system(turns)
        if any(message.role is Role.SYSTEM for message in turns) or not self.system_first:
            yield _fold_system(turns)

    def as_dicts(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Return messages as the template reads them."""
        return [self._as_dict(message) for message in messages]

    def _as_dict(self, message: Message) -> dict[str, Any]:
        parts = [{"type": "text", "text": message.content}]
        return {"role": message.role.value, "content": parts if message.role in self.parts else message.content}


def probe_form(template: Template) -> TemplateForm:
    """Ask a template by dry runs: some refuse a role or a place, some leave it out without a word.

    Raises: ValueError: it takes too much for so few words, and would for any; or it shows nothing that a user says.
    """
    form = _with_role(template, TemplateForm(), Role.USER, [[], [_USER, _ASSISTANT]], required=True)
    form = _with_role(template, form, Role.ASSISTANT, [[_USER]], behind=[_USER])
    system, tool = Message(Role.SYSTEM, _PROBE), Message(Role.TOOL, _PROBE)
    form = _with_role(template, form, Role.SYSTEM, [[]], behind=[_USER])
    form = _with_role(template, form, Role.TOOL, [[_USER, _ASSISTANT]])
    return replace(
        form,
        system_first=_shows(template, form, [system, _USER]),
        system_later=_shows(template, form, [_USER, _ASSISTANT, system, _USER]),
        system_by_default=_has_system_text(template, form),
        tools=_shows(template, form, [_USER, _ASSISTANT, tool]),
    )


def _with_role(
    template: Template,
    form: TemplateForm,
    role: Role,
    before: Sequence[list[Message]],
    *,
    behind: Sequence[Message] = (),
    required: bool = False,
) -> TemplateForm:
    """Return the form with the content of a role as the template shows it: text where it shows both or neither.

    Args: before, behind: what may stand around the message.
    Raises: ValueError: it is required, and the template takes it without showing it.
    """
    probe = Message(role, _PROBE)
    conversations = [[*each, probe, *behind] for each in before]
    forms = [form, replace(form, parts=form.parts | {role})]
    rendered = [_dry_run(template, each, messages) for each in forms for messages in conversations]
    for each in forms:
        if any(_shows(template, each, messages) for messages in conversations):
            return each
    if required and any(text is not None for text in rendered):
        raise ValueError("chat_template: it shows nothing of what a user says, neither as text nor as content parts")
    return form


def _shows(template: Template, form: TemplateForm, messages: Sequence[Message]) -> bool:
    text = _dry_run(template, form, messages)
    # A list of parts that is written as it stands is shown to nobody's benefit.
    return text is not None and _PROBE in text and "'type'" not in text


def _has_system_text(template: Template, form: TemplateForm) -> bool:
    """Return whether a conversation becomes shorter by an empty system message."""
    without = _dry_run(template, form, [_USER])
    empty = _dry_run(template, form, [Message(Role.SYSTEM, ""), _USER])
    return without is not None and empty is not None and len(empty) < len(without)


def _dry_run(template: Template, form: TemplateForm, messages: Sequence[Message]) -> str | None:
    """Return what the template writes; None where it refuses.

    Raises: ValueError: it takes too much.
    """
    try:
        return template.render(form.as_dicts(messages))
    except TemplateRefusedError:
        return None
    except TemplateExhaustedError as error:
        raise ValueError(f"chat_template: {error} for a few words") from None


def _hoist_system(messages: Iterable[Message]) -> list[Message]:
    """Move the system texts to the beginning, as one message."""
    turns = list(messages)
    system = [message.content for message in turns if message.role is Role.SYSTEM and message.content]
    return [
        Message(Role.SYSTEM, "\n\n".join(system)),
        *(message for message in turns if message.role is not Role.SYSTEM),
    ]


def _fold_system(messages: Iterable[Message]) -> list[Message]:
    """Put each system text in front of the user message that follows it."""
    turns: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role is Role.SYSTEM:
            waiting += [message.content] if message.content else []
            continue
        if waiting and message.role is Role.USER:
            message = Message(Role.USER, "\n\n".join([*waiting, message.content]))
        elif waiting:
            turns.append(Message(Role.USER, "\n\n".join(waiting)))
        waiting = []
        turns.append(message)
    if waiting:
        turns.append(Message(Role.USER, "\n\n".join(waiting)))
    return turns


def _fold_tools(messages: Iterable[Message]) -> list[Message]:
    """Let the user say what tools said, as one message where two would come together: most templates want turns."""
    turns: list[Message] = []
    folding = False
    for message in messages:
        folded, folding = folding, message.role is Role.TOOL
        spoken = Message(Role.USER, message.content) if folding else message
        if turns and spoken.role is turns[-1].role is Role.USER and (folded or folding):
            spoken = Message(Role.USER, f"{turns.pop().content}\n\n{spoken.content}")
        turns.append(spoken)
    return turns
