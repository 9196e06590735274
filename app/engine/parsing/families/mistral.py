"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and since 2025 `[TOOL_CALLS]name[ARGS]{...}`."""

import re

from app.engine.parsing.families.call_object import CallState, read_arguments, read_call_list, read_rest
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MAX_NAME_CHARS = 256
_ID = re.compile(r"[a-zA-Z0-9]{9}")
_AFTER_NAME = re.compile(r"[^\w.-]")


def parse_mistral(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with calls in either form."""
    begin = marks(CALLS)
    while not out.is_over and (yield from read_text(source, out, begin)):
        yield from source.blank()
        if (yield from source.peek(1)) == "[":
            before = out.calls
            state = yield from read_call_list(source, out)
            if state is CallState.NONE:
                reject(source, out, begin if out.calls == before else "")
            elif state is CallState.BROKEN:
                yield from read_rest(source, out, state)
        elif not (yield from _read_named(source, out, marks)):
            reject(source, out, begin)


def _read_named(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[bool]:
    """Read `name[ARGS]{...}`, with an id between the two in some versions."""
    name = yield from _read_name(source)
    call_id = None
    if (yield from source.accept(marks(CALL_ID))):
        call_id = yield from _read_name(source)
    if (yield from source.accept(marks(ARGS))) is None and (yield from source.peek(1)) != "{":
        return False
    if not out.open_call(name, call_id if call_id and _ID.fullmatch(call_id) else None):
        return False
    yield from source.blank()
    if not (yield from read_arguments(source, out.arguments)):
        yield from source.until(out.arguments)
    out.close_call()
    return True


def _read_name(source: Scanner) -> Scan[str]:
    name = ""
    while len(name) < MAX_NAME_CHARS:
        text, sign = source.take_before(_AFTER_NAME)
        name += text
        if sign or not (yield from source.more()):
            break
    return name
