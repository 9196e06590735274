"""Llama 3: a completion that is `{"name": ..., "parameters": {...}}`, with or without `<|python_tag|>` in front."""

from app.engine.parsing.families.call_object import CallState, read_call
from app.engine.parsing.marks import Marks
from app.engine.parsing.output import ParsedOutput, read_text, reject
from app.engine.parsing.scanner import Scan, Scanner

TAG = "<|python_tag|>"


def parse_llama(source: Scanner, out: ParsedOutput, marks: Marks) -> Scan[None]:
    """Read an answer, or calls that stand at its beginning or behind the tag; several are parted by semicolons."""
    tag = marks(TAG)
    source.hold()
    yield from source.blank()
    if (yield from source.peek(1)) == "{":
        yield from _read_calls(source, out, "")
    else:
        source.rewind()
    while not out.is_over and (yield from read_text(source, out, tag)):
        yield from source.blank()
        yield from _read_calls(source, out, tag)


def _read_calls(source: Scanner, out: ParsedOutput, mark: str) -> Scan[None]:
    while True:
        state = yield from read_call(source, out)
        if state is CallState.NONE:
            reject(source, out, mark)
            return
        if state is CallState.BROKEN:
            yield from source.until(out.arguments)
        out.close_call()
        source.hold()
        yield from source.blank()
        separated = yield from source.accept(";")
        yield from source.blank()
        if out.is_over or (yield from source.peek(1)) != "{":
            source.release() if separated else source.rewind()
            return
        mark = ""
