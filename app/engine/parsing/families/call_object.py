"""Reads a call that is written as one JSON object: `{"name": ..., "arguments": {...}}`."""

from enum import Enum

from app.engine.parsing.json_text import read_string, read_value, string_value
from app.engine.parsing.output import ParsedOutput
from app.engine.parsing.scanner import Scan, Scanner, Write, ignore

ARGUMENTS = ("arguments", "parameters")


class CallState(Enum):
    """How far a call could be read."""

    NONE = "none"
    """No call has begun: what there is, is text."""
    BROKEN = "broken"
    """A call has begun, and what follows is not what should."""
    WHOLE = "whole"
    """All of the object has been read."""


def read_call(source: Scanner, out: ParsedOutput) -> Scan[CallState]:
    """Read an object with a name and arguments, in any order, which begin a call once the name is known."""
    waiting: str | None = None
    if (yield from source.accept("{")) is None:
        return CallState.NONE
    while True:
        key = yield from _key(source)
        if key == "name" and not out.is_open:
            if not out.open_call((yield from read_string(source))):
                return CallState.NONE
            if waiting is not None:
                out.arguments(waiting)
        elif key in ARGUMENTS and out.is_open and waiting is None:
            if not (yield from read_arguments(source, out.arguments)):
                return CallState.BROKEN
            waiting = ""
        elif key in ARGUMENTS and waiting is None:
            held: list[str] = []
            if not (yield from read_arguments(source, held.append)):
                return CallState.NONE
            waiting = "".join(held)
        elif key is None or not (yield from read_value(source, ignore)):
            break
        yield from source.blank()
        separator = yield from source.accept(",", "}")
        if separator == "}" and out.is_open:
            return CallState.WHOLE
        # A missing comma is no reason to lose what follows.
        if separator is None and (yield from source.peek(1)) != '"':
            break
    if not out.is_open:
        return CallState.NONE
    # What follows whole arguments is no part of them.
    return CallState.WHOLE if waiting is not None else CallState.BROKEN


def read_arguments(source: Scanner, write: Write) -> Scan[bool]:
    """Read the arguments of a call, which some models write as a JSON string that holds JSON, or as null for none."""
    first = yield from source.peek(1)
    if first in ("{", "["):
        return (yield from read_value(source, write))
    raw: list[str] = []
    whole = yield from read_value(source, raw.append)
    text = "".join(raw)
    inner = string_value(text) if whole and first == '"' else None
    if inner is not None and inner.lstrip().startswith("{"):
        text = inner
    write("{}" if text == "null" else text)
    return whole


def read_call_list(source: Scanner, out: ParsedOutput) -> Scan[CallState]:
    """Read calls as a JSON array of objects; one that is no call ends it, and is left as text."""
    if (yield from source.accept("[")) is None:
        return CallState.NONE
    while True:
        yield from source.blank()
        if out.calls:
            source.hold()
        state = yield from read_call(source, out)
        if state is not CallState.WHOLE:
            return state
        out.close_call()
        yield from source.blank()
        if out.is_over or (yield from source.accept(",")) is None:
            yield from source.accept("]")
            return CallState.WHOLE


def _key(source: Scanner) -> Scan[str | None]:
    """Read a key and the colon behind it."""
    yield from source.blank()
    key = yield from read_string(source)
    yield from source.blank()
    if key is None or (yield from source.accept(":")) is None:
        return None
    yield from source.blank()
    return key


def read_rest(source: Scanner, out: ParsedOutput, state: CallState, *ends: str) -> Scan[str | None]:
    """Read the rest of a call up to its end mark, and end the call; it belongs to arguments that broke off."""
    mark = yield from source.until(out.arguments if state is CallState.BROKEN else ignore, *ends)
    out.close_call()
    return mark
