"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and the XML form of Qwen3-Coder.

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>
"""

from app.engine.parsing.families.call_object import CallState, read_call, read_rest
from app.engine.parsing.families.schema_values import ValueWriter, properties_of
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
MAX_NAME_CHARS = 256


def parse_hermes(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with calls, each either a JSON object or in the XML form."""
    begin, end = marks(BEGIN), marks(END)
    while not out.is_over and (yield from read_text(source, out, begin)):
        yield from source.blank()
        if (yield from source.accept(FUNCTION)):
            state = yield from _read_function(source, out, end)
        else:
            state = yield from read_call(source, out)
        if state is CallState.NONE:
            reject(source, out, begin)
        else:
            yield from read_rest(source, out, state, end)


def parse_qwen_xml(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with calls in the XML form, around which some models forget the outer tags."""
    begin, end = marks(BEGIN), marks(END)
    while not out.is_over and (mark := (yield from read_text(source, out, begin, FUNCTION))):
        state = CallState.NONE
        if mark == begin:
            yield from source.blank()
        if mark == FUNCTION or (yield from source.accept(FUNCTION)):
            state = yield from _read_function(source, out, end)
        elif (yield from source.peek(1)) == "{":
            state = yield from read_call(source, out)
        if state is CallState.NONE:
            reject(source, out, mark)
        elif mark == begin:
            yield from read_rest(source, out, state, end)
        else:
            out.close_call()
            yield from _accept_after_blank(source, end)


def _accept_after_blank(source: Scanner, mark: str) -> Scan[None]:
    yield from source.blank()
    yield from source.accept(mark)


def _read_function(source: Scanner, out: ParsedOutput, end: str) -> Scan[CallState]:
    """Read what follows `<function=`, and write its parameters as a JSON object."""
    name = yield from _name(source)
    if not out.open_call(name):
        return CallState.NONE
    assert name is not None  # noqa: S101  # no call was opened without one
    properties = properties_of(out.tools[name].parameters)
    first = True
    while True:
        yield from source.blank()
        mark = yield from source.accept(PARAMETER, FUNCTION_END)
        if mark != PARAMETER:
            break
        key = yield from _name(source)
        if key is None:
            break
        value = ValueWriter(out.arguments, key, properties.get(key), first=first)
        first = False
        closed = yield from source.until(value.write, PARAMETER_END, end)
        value.finish(whole=closed is not None)
        if closed == end:
            source.unread(end)
        if closed != PARAMETER_END:
            mark = closed
            break
    if mark is None:
        return CallState.BROKEN
    out.arguments("{}" if first else "}")
    return CallState.WHOLE


def _name(source: Scanner) -> Scan[str | None]:
    """Read a name up to `>`; None: there is none."""
    name: list[str] = []
    while sum(map(len, name)) < MAX_NAME_CHARS:
        character = yield from source.peek(1)
        if character in ("", "\n", "<"):
            return None
        source.take(1)
        if character == ">":
            return "".join(name).strip()
        name.append(character)
    return None
