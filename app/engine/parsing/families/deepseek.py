"""DeepSeek V3, R1 and V3.1: calls between marks of their own.

V3 and R1: <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name
           ```json
           {...}
           ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
V3.1:      <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from app.engine.parsing.families.call_object import CallState, read_arguments, read_rest
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"
MAX_NAME_CHARS = 256


def parse_deepseek(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer with one or more groups of calls."""
    group, begin = marks(CALLS_BEGIN), marks(BEGIN)
    while not out.is_over and (mark := (yield from read_text(source, out, group, begin))):
        before = out.calls
        if mark == group:
            yield from source.blank()
        if mark == begin or (yield from source.accept(begin)):
            while (yield from _read_call(source, out, marks)) and not out.is_over:
                source.hold()
                yield from source.blank()
                if not (yield from source.accept(begin)):
                    break
        if out.calls == before:
            reject(source, out, mark)
        elif not (yield from source.accept(marks(CALLS_END))):
            reject(source, out)


def _read_call(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[bool]:
    """Read what follows the mark of one call."""
    separator, end = marks(SEPARATOR), marks(END)
    name = yield from _read_up_to(source, separator)
    if name == "function":
        name = yield from _read_up_to(source, "\n")
    if name is None or not out.open_call(name.strip()):
        return False
    yield from source.blank()
    if (yield from source.accept(FENCE)):
        yield from source.accept("json")
        yield from source.blank()
    whole = yield from read_arguments(source, out.arguments)
    yield from read_rest(source, out, CallState.WHOLE if whole else CallState.BROKEN, end)
    return True


def _read_up_to(source: Scanner, mark: str) -> Scan[str | None]:
    """Read a short text up to a mark; None: the mark does not come."""
    text = ""
    while len(text) < MAX_NAME_CHARS:
        if (yield from source.accept(mark)):
            return text
        character = yield from source.peek(1)
        if not character:
            return None
        text += source.take(1)
    return None
