"""A form that no parser here knows, as the tokenizer's own description has it: transformers' `response_template`.

Its calls come whole, once they have ended.  Of an answer that the description does not fit the rest is text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from app.engine.parsing.marks import hide_tokens
from app.engine.parsing.output import ParsedOutput
from app.engine.parsing.scanner import Scan, Scanner
from app.engine.tokenizer.shown_tokens import BEGIN, END

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What descriptions call what the model thinks."""
_UNITS = re.compile(f"{BEGIN}[^{END}]*{END}|.", re.DOTALL)
"""Special tokens and characters."""
_NAMES_ONLY = str.maketrans("", "", BEGIN + END)


def parse_described(source: Scanner, out: ParsedOutput, description: str, prompt_end: str) -> Scan[None]:
    """Read an answer, its reasoning and its calls."""
    reader = _Described(out, json.loads(description), prompt_end)
    yield from source.until(reader.feed)
    reader.finish()


class _Described:
    """Follows transformers' parser of one completion."""

    def __init__(self, out: ParsedOutput, description: dict[str, Any], prompt_end: str) -> None:
        from transformers.utils.chat_parsing import ResponseParser
        from transformers.utils.chat_parsing.response_templates import load_response_template

        template = load_response_template(description)
        # Without the beginning of the turn all of the prompt would be taken for it.
        begun = prompt_end if template.start_anchor_re.search(prompt_end) else ""
        tools: list[Any] = [{"name": tool.name, "parameters": _object(tool.parameters)} for tool in out.tools.values()]
        self._parser: Any = ResponseParser(template, prefix=begun, tools=tools)
        self._out = out
        self._region = ""
        """What the region that is open holds and has not been delivered."""
        self._broken = False
        for event in self._parser.initial_events:
            if event["type"] == "region_open" and event["field"] in REASONING:
                out.begin_reasoning()
            elif event["type"] == "region_close" and event["field"] in REASONING:
                out.end_reasoning()

    def feed(self, text: str) -> None:
        """Read more text."""
        # One by one: what the parser has found before it fails is lost.
        for found in _UNITS.finditer(text):
            if self._broken:
                self._out.text(hide_tokens(text[found.start() :]))
                return
            self._region += found.group()
            self._follow(partial(self._parser.feed, found.group().translate(_NAMES_ONLY)))

    def finish(self) -> None:
        """Read the end."""
        if not self._broken:
            self._follow(lambda: self._parser.finalize()[1])

    def _follow(self, read: Callable[[], list[dict[str, Any]]]) -> None:
        """Deliver what the parser finds; where it gives up, leave what has not been delivered as text, and the rest."""
        try:
            events = read()
        except (ValueError, KeyError, RecursionError):
            self._broken = True
            self._out.text(hide_tokens(self._region))
        else:
            self._deliver(events)

    def _deliver(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            kind, field, text = event["type"], event["field"], event.get("text", "")
            if field in REASONING:
                if kind == "region_open":
                    self._out.begin_reasoning()
                elif kind == "region_close":
                    self._region = ""
                    self._out.end_reasoning()
                else:
                    self._out.reasoning(text)
            elif field == "content" and kind == "region_chunk":
                self._region = self._region.removeprefix(text)
                self._out.text(text)
            elif field == "tool_calls" and kind == "region_close":
                self._call(event["value"])
                self._region = ""

    def _call(self, value: Any) -> None:
        for name, arguments in _calls(value):
            if self._out.is_over:
                return
            if self._out.open_call(name):
                self._out.arguments(arguments)
                self._out.close_call()
            else:
                self._out.text(hide_tokens(self._region))


def _calls(value: Any) -> Iterator[tuple[str | None, str]]:
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function", each) if isinstance(each, dict) else {}
        name, arguments = function.get("name"), function.get("arguments", {})
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        yield name if isinstance(name, str) else None, written


def _object(text: str) -> Mapping[str, Any]:
    value = json.loads(text or "{}")
    return value if isinstance(value, dict) else {}
