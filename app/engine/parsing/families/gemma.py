"""Gemma: `<|tool_call>call:name{key:<|"|>text<|"|>,count:3}<tool_call|>` of Gemma 4, and FunctionGemma's marks for it.

The arguments are JSON but for keys without quotes and strings between marks of their own.
"""

import json
import re
from dataclasses import dataclass

from app.engine.parsing.families.call_object import CallState, read_rest
from app.engine.parsing.json_text import read_value
from app.engine.parsing.marks import Marks, hide_tokens
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner, Write

CALL = "call:"
MAX_NAME_CHARS = 256
MAX_DEPTH = 100
"""Objects and lists within each other; arguments that go deeper break off there."""
_AFTER_NAME = re.compile(r"[^\w.-]")
_AFTER_KEY = re.compile(r"[:{}\[\],\s]")
_AFTER_SCALAR = re.compile(r"[,}\]]")
_LITERAL = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class GemmaMarks:
    """The marks around a call and around a string in its arguments."""

    begin: str
    end: str
    quote: str


GEMMA_4 = GemmaMarks("<|tool_call>", "<tool_call|>", '<|"|>')
FUNCTION_GEMMA = GemmaMarks("<start_function_call>", "<end_function_call>", "<escape>")


def parse_gemma4(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with calls as Gemma 4 writes them."""
    yield from _parse(source, out, marks, GEMMA_4)


def parse_function_gemma(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with calls as FunctionGemma writes them."""
    yield from _parse(source, out, marks, FUNCTION_GEMMA)


def _parse(source: Scanner, out: ParsedOutput, marks: Marks, names: GemmaMarks) -> Scan[None]:
    begin, end, quote = marks(names.begin), marks(names.end), marks(names.quote)
    while not out.is_over and (yield from read_text(source, out, begin)):
        name = None
        if (yield from source.accept(CALL)):
            name = yield from _read_up_to(source, _AFTER_NAME)
        if (yield from source.peek(1)) != "{" or not out.open_call(name):
            reject(source, out, begin)
            continue
        whole = yield from _LaxJson(source, out.arguments, quote).object()
        yield from read_rest(source, out, CallState.WHOLE if whole else CallState.BROKEN, end)


def _read_up_to(source: Scanner, sign: re.Pattern[str]) -> Scan[str]:
    read = ""
    while len(read) < MAX_NAME_CHARS:
        text, found = source.take_before(sign)
        read += text
        if found or not (yield from source.more()):
            break
    return read


class _LaxJson:
    """Reads arguments in this form, and writes them as JSON; each method returns False where they break off."""

    def __init__(self, source: Scanner, write: Write, quote: str) -> None:
        self._source = source
        self._write = write
        self._quote = quote
        self._depth = 0

    def object(self) -> Scan[bool]:
        source = self._source
        self._write(source.take(1))
        first = True
        while True:
            yield from source.blank()
            if (yield from source.accept("}")):
                self._write("}")
                return True
            if not first and not (yield from self._separator()):
                return False
            first = False
            if not (yield from self._key()) or not (yield from self._value()):
                return False

    def _key(self) -> Scan[bool]:
        source = self._source
        if (yield from source.accept(self._quote)):
            if not (yield from self._string()):
                return False
        elif (yield from source.peek(1)) == '"':
            if not (yield from read_value(source, self._write)):
                return False
        else:
            key = yield from _read_up_to(source, _AFTER_KEY)
            if not key:
                return False
            self._write(json.dumps(key, ensure_ascii=False))
        yield from source.blank()
        if not (yield from source.accept(":")):
            return False
        self._write(": ")
        yield from source.blank()
        return True

    def _value(self) -> Scan[bool]:
        source = self._source
        if (yield from source.accept(self._quote)):
            return (yield from self._string())
        first = yield from source.peek(1)
        if first and first in "{[":
            if self._depth == MAX_DEPTH:
                return False
            self._depth += 1
            whole = yield from (self.object() if first == "{" else self._array())
            self._depth -= 1
            return whole
        if first == '"':
            return (yield from read_value(source, self._write))
        return (yield from self._scalar())

    def _array(self) -> Scan[bool]:
        source = self._source
        self._write(source.take(1))
        first = True
        while True:
            yield from source.blank()
            if (yield from source.accept("]")):
                self._write("]")
                return True
            if not first and not (yield from self._separator()):
                return False
            first = False
            if not (yield from self._value()):
                return False

    def _separator(self) -> Scan[bool]:
        if not (yield from self._source.accept(",")):
            return False
        self._write(", ")
        yield from self._source.blank()
        return True

    def _string(self) -> Scan[bool]:
        self._write('"')
        found = yield from self._source.until(self._escaped, self._quote)
        if found is None:
            return False
        self._write('"')
        return True

    def _scalar(self) -> Scan[bool]:
        text = (yield from _read_up_to(self._source, _AFTER_SCALAR)).strip()
        if not text or (yield from self._source.peek(1)) == "":
            self._write(text)
            return False
        self._write(text if _LITERAL.fullmatch(text) else json.dumps(hide_tokens(text), ensure_ascii=False))
        return True

    def _escaped(self, text: str) -> None:
        self._write(json.dumps(text, ensure_ascii=False)[1:-1])
