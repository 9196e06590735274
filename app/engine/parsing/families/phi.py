"""Phi-4: `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`, or `functools[...]`."""

from app.engine.parsing.families.call_object import CallState, read_call_list, read_rest
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner

BEGIN, END = "<|tool_call|>", "<|/tool_call|>"
FUNCTOOLS = "functools"


def parse_phi(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with one or more lists of calls."""
    begin, end = marks(BEGIN), marks(END)
    while not out.is_over and (mark := (yield from read_text(source, out, begin, FUNCTOOLS + "["))):
        if mark == begin:
            yield from source.blank()
        else:
            source.unread("[")
        before = out.calls
        state = yield from read_call_list(source, out)
        if state is CallState.NONE:
            reject(source, out, mark if out.calls == before else "")
        elif state is CallState.BROKEN:
            yield from read_rest(source, out, state, end)
        else:
            yield from source.blank()
            yield from source.accept(end)
