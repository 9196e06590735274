"""What form a chat template wants messages in, found by dry runs when a model is loaded.

Decides for each role whether its content is a text or a list of parts, where system messages may stand, and what takes
their place where they may not.  Renders by way of the template alone: it knows neither tokens nor requests.
`call_form.py` has the form of an assistant's calls.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from app.engine.tokenizer.call_form import CALL_FORMS, PROBE_CALL, PROBE_TOOL, TRANSFORMERS_FORM, CallForm, split_calls
from app.engine.tokenizer.chat_template import TemplateExhaustedError, TemplateRefusedError
from app.engine.tokenizer.tool_prompt import calls_text, definition, result_text
from app.types import Message, Role, ToolCall

_PROBE = "Be brief."
_USER, _ASSISTANT = Message(Role.USER, "Hello"), Message(Role.ASSISTANT, "Well")
_CALLING = Message(Role.ASSISTANT, "", tool_calls=(PROBE_CALL,))


class Template(Protocol):
    """Renders conversations; `ChatTemplate` does."""

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
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
    definitions: bool = True
    """Whether it shows the tools that may be called."""
    calls: CallForm | None = TRANSFORMERS_FORM
    """How it takes an assistant's calls; None: it does not show them."""
    reasoning: bool = True
    """Whether it shows what an assistant thought before it answered or called."""

    def arrangements(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """Yield the conversation in the orders that the template may take, the one that changes least first.

        A system message moves to the beginning, or into the user's next message, only where the template does not show
        it in its place.  Every later arrangement is for a template that refuses the ones before.
        """
        yield from self._ordered(messages)
        if any(message.reasoning for message in messages):
            yield from self._ordered([replace(message, reasoning=None) for message in messages])

    def _ordered(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        turns = list(messages)
        if self.calls is None:
            turns = [_fold_calls(message) for message in turns]
        elif self.calls.single:
            turns = split_calls(turns)
        if not self.system_by_default:
            turns = [message for message in turns if message.content or message.role is not Role.SYSTEM]
        # Where a call is written as text, so is the result that names it.
        if any(message.role is Role.TOOL and not self._shows_result(message) for message in turns):
            turns = _fold_tools(turns)
        is_later = any(message.role is Role.SYSTEM for message in turns[1:])
        if self.system_first and (self.system_later or not is_later):
            yield turns
        if self.system_first and is_later:
            yield _hoist_system(turns)
        if any(message.role is Role.SYSTEM for message in turns) or not self.system_first:
            yield _fold_system(turns)

    def _shows_result(self, message: Message) -> bool:
        return self.tools and (self.calls is not None or message.tool_call_id is None)

    def as_dicts(self, messages: Iterable[Message]) -> list[dict[str, Any]]:
        """Return messages as the template reads them; a tool's message gets the name of what was called."""
        turns = list(messages)
        called = {call.id: call.name for message in turns for call in message.tool_calls}
        return [self._as_dict(message, called) for message in turns]

    def _as_dict(self, message: Message, called: Mapping[str, str]) -> dict[str, Any]:
        parts = [{"type": "text", "text": message.content}]
        fields = {"role": message.role.value, "content": parts if message.role in self.parts else message.content}
        calls = self.calls or TRANSFORMERS_FORM
        if message.tool_calls:
            fields = calls.with_calls(fields, message)
        if message.tool_call_id is not None:
            fields["tool_call_id"] = calls.shown_id(message.tool_call_id)
        name = called.get(message.tool_call_id or "") if message.role is Role.TOOL else None
        if name := message.name or name:
            fields["name"] = name
        if message.reasoning is not None:
            # Both names, as transformers gives them: templates read either.
            fields |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        return fields


def probe_form(template: Template) -> TemplateForm:
    """Ask a template by dry runs: some refuse a role or a place, some leave it out without a word.

    Raises: ValueError: it takes too much for so few words, and would for any; or it shows nothing that a user says.
    """
    form = _with_role(template, TemplateForm(), Role.USER, [[], [_USER, _ASSISTANT]], required=True)
    form = _with_role(template, form, Role.ASSISTANT, [[_USER]], behind=[_USER])
    system, tool = Message(Role.SYSTEM, _PROBE), Message(Role.TOOL, _PROBE)
    form = _with_role(template, form, Role.SYSTEM, [[]], behind=[_USER])
    form = replace(form, calls=_call_form(template, form))
    called = replace(tool, tool_call_id=PROBE_CALL.id)
    form = _with_role(template, form, Role.TOOL, [[_USER, _CALLING], [_USER, _ASSISTANT]])
    thinking = replace(_CALLING, reasoning=_PROBE)
    return replace(
        form,
        system_first=_shows(template, form, [system, _USER]),
        system_later=_shows(template, form, [_USER, _ASSISTANT, system, _USER]),
        system_by_default=_has_system_text(template, form),
        tools=_shows(template, form, [_USER, _CALLING, called]) or _shows(template, form, [_USER, _ASSISTANT, tool]),
        definitions=_shows_definitions(template, form),
        reasoning=_shows(template, form, [_USER, thinking, replace(called, content="noon")])
        or _shows(template, form, [_USER, replace(_ASSISTANT, reasoning=_PROBE), _USER]),
    )


def _call_form(template: Template, form: TemplateForm) -> CallForm | None:
    """Return how a template takes calls, as transformers gives them where it does; None where it shows none."""
    result = Message(Role.TOOL, "noon", tool_call_id=PROBE_CALL.id)
    second = replace(PROBE_CALL, id=PROBE_CALL.id[::-1])

    def shows(calls: CallForm, *, calls_in_one: Sequence[ToolCall] = (PROBE_CALL,)) -> bool:
        tried = replace(form, calls=calls)
        conversation = [_USER, replace(_CALLING, tool_calls=tuple(calls_in_one)), result]
        texts = (_dry_run(template, tried, conversation), _dry_run(template, tried, conversation[:-1]))
        return any(text is not None and calls.is_shown(text, len(calls_in_one)) for text in texts)

    found = next(filter(shows, CALL_FORMS), None)
    if found is not None and not shows(found, calls_in_one=(PROBE_CALL, second)):
        return replace(found, single=True)
    return found


def _shows_definitions(template: Template, form: TemplateForm) -> bool:
    tools = [definition(PROBE_TOOL)]
    texts = [
        _dry_run(template, form, messages, tools) for messages in ([_USER], [Message(Role.SYSTEM, "Be kind."), _USER])
    ]
    return any(text is not None and PROBE_TOOL.name in text and "'type'" not in text for text in texts)


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
    probe = Message(role, _PROBE, tool_call_id=PROBE_CALL.id if role is Role.TOOL else None)
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


def _dry_run(
    template: Template,
    form: TemplateForm,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str | None:
    """Return what the template writes; None where it refuses.

    Raises: ValueError: it takes too much.
    """
    try:
        return template.render(form.as_dicts(messages), tools=tools)
    except TemplateRefusedError:
        return None
    except TemplateExhaustedError as error:
        raise ValueError(f"chat_template: {error} for a few words") from None


def _fold_calls(message: Message) -> Message:
    """Let the assistant's text say what it called."""
    if not message.tool_calls:
        return message
    return replace(message, content=calls_text(message.content, message.tool_calls), tool_calls=())


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
        said = message.content if message.tool_call_id is None else result_text(message.content)
        spoken = Message(Role.USER, said) if folding else message
        if turns and spoken.role is turns[-1].role is Role.USER and (folded or folding):
            spoken = Message(Role.USER, f"{turns.pop().content}\n\n{spoken.content}")
        turns.append(spoken)
    return turns
