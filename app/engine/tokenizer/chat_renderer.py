"""Writes conversations by one chat template: messages, tools and variables in, the text that is to be encoded out.

Decides what a conversation becomes where the template refuses it or does not show a part of it, and what is said then.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.engine.tokenizer.chat_template import ChatTemplate, TemplateExhaustedError, TemplateRefusedError
from app.engine.tokenizer.control_marks import ControlMarks
from app.engine.tokenizer.template_form import probe_form
from app.engine.tokenizer.tool_prompt import definition, tools_text
from app.errors import InvalidRequest
from app.requests import TemplateValue
from app.types import Message, Role, Tool

log = logging.getLogger(__name__)

_RESERVED = frozenset(
    """messages tools documents add_generation_prompt continue_final_message chat_template tokenize
    return_assistant_tokens_mask""".split()
)
"""Variables that are the service's own."""
_TOO_DEEP = "The arguments of a call are nested too deep for the model's chat template."


class ChatRenderer:
    """Renders conversations; safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], marks: ControlMarks) -> None:
        """Compile the template and find out its form.

        Raises: ValueError: it cannot be used; the message is one line.
        """
        self._template = ChatTemplate(source, special_tokens)
        self._marks = marks
        self.form = probe_form(self._template)
        self.variables = frozenset(self._template.reads) - _RESERVED - special_tokens.keys()
        """What a request may set: variables that the template reads and the service does not."""

    def close(self) -> None:
        """End the processes that render."""
        self._template.close()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Sequence[tuple[str, TemplateValue]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """Return what the template writes, with marks around the control tokens that the request spells.

        Raises: InvalidRequest: it takes the conversation in no form.
        """
        if tools and not self.form.definitions:
            messages, tools = _with_tools_text(messages, tools), ()
        variables = self._marks.mark({name: value for name, value in template_kwargs if name in self.variables})
        definitions = self._marks.mark([definition(tool) for tool in tools])
        refusals: list[TemplateRefusedError] = []
        for turns in self.form.arrangements(messages):
            try:
                text = self._template.render(
                    [self._marked(message) for message in self.form.as_dicts(turns)],
                    tools=definitions,
                    continue_final_message=continue_final_message,
                    **variables,
                )
                return self._marks.mend(text)
            except TemplateExhaustedError:
                raise InvalidRequest(
                    "The model's chat template takes more time or memory for these messages than the service gives."
                ) from None
            except UnicodeEncodeError:
                raise InvalidRequest("The messages are not valid Unicode text.") from None
            except RecursionError:
                raise InvalidRequest(_TOO_DEEP) from None
            except TemplateRefusedError as refusal:
                refusals.append(refusal)
        log.info("the chat template refused a conversation: %s", refusals[0])
        raise InvalidRequest(_refusal(refusals[0]))

    def _marked(self, message: dict[str, Any]) -> dict[str, Any]:
        """Mark the control tokens that a message spells; what surrounds the assistant's thoughts is the template's."""
        marked: dict[str, Any] = self._marks.mark(message, is_assistant=message["role"] == Role.ASSISTANT.value)
        return marked


def _with_tools_text(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return a conversation whose first system message tells of the tools."""
    text = tools_text(tools)
    turns = list(messages)
    place = next((at for at, message in enumerate(turns) if message.role is Role.SYSTEM), None)
    if place is None:
        return [Message(Role.SYSTEM, text), *turns]
    given = turns[place].content
    turns[place] = replace(turns[place], content=f"{given}\n\n{text}" if given else text)
    return turns


def _refusal(refusal: TemplateRefusedError) -> str:
    if not refusal.deliberate:
        return f"The model's chat template fails on these messages ({refusal})."
    if refusal.said:
        return f"The model's chat template does not take these messages: {refusal.said}"
    return (
        "The model's chat template does not take these messages. "
        "Begin with the user and let user and assistant take turns."
    )
