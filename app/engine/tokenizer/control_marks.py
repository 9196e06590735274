"""Marks the control tokens that a request spells, at any depth, so that they are encoded as text.

transformers puts a private character on either side of each, which its encoder looks for.  Decides what else a template
may do with a marked text: cut it, or write it with escapes.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers.utils.chat_template_utils import mark_control_tokens

from app.engine.tokenizer.template_process import MARKS
from app.errors import InvalidRequest

_START, _END = MARKS
_ESCAPED = r"(?:\\U000f0000|\\udb80\\udc00)"
"""The first mark as Python and JSON escape it."""
_OURS = frozenset(
    """role content type text name tool_calls tool_call_id function arguments id reasoning_content thinking description
    parameters properties required items enum""".split()
)
"""Keys that templates look up; a tokenizer may have one of them for a control token."""


class ControlMarks:
    """The control tokens of one model."""

    def __init__(self, names: Iterable[str], thought: Iterable[str]) -> None:
        """Args: thought: which of the names surround reasoning; in what an assistant said they are its own."""
        every = sorted(names, key=len, reverse=True)
        self._any = _any_of(every)
        self._others = _any_of([name for name in every if name not in set(thought)])
        found = f"(?:{self._any.pattern})"
        self._torn = re.compile(f"{_START}(?P<headless>{found})(?!{_END})|(?<!{_START})(?P<tailless>{found}){_END}")
        self._escaped = re.compile(_ESCAPED + found)

    def mark(self, value: Any, *, is_assistant: bool = False) -> Any:
        """Return a value of JSON's types with marks in all its texts, and in the keys that the caller chose."""
        return self._marked(value, self._others if is_assistant else self._any)

    def mend(self, text: str) -> str:
        """Return what a template has written with both marks around each token that has lost one of them.

        Raises: InvalidRequest: the template writes a mark with escapes, so that the token behind it would be one.
        """
        if self._escaped.search(text):
            raise InvalidRequest("The messages or tools hold a control token that the model's template cannot show.")
        if _START not in text and _END not in text:
            return text
        return self._torn.sub(lambda found: f"{_START}{found['headless'] or found['tailless']}{_END}", text)

    def _marked(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, dict):
            return {self._key(key, pattern): self._marked(item, pattern) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item, pattern) for item in value]
        return mark_control_tokens(value, pattern) if isinstance(value, str) else value

    def _key(self, key: str, pattern: re.Pattern[str]) -> str:
        return key if key in _OURS else str(mark_control_tokens(key, pattern))


def _any_of(names: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or "(?!)")
