"""gpt-oss: messages in channels, `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final...`.

The channel analysis is reasoning, final is the answer, and commentary is said to the user or, with a recipient, a call:
`<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>`.
"""

import re

from app.engine.parsing.marks import Marks, hide_tokens
from app.engine.parsing.output import ParsedOutput
from app.engine.parsing.scanner import Scan, Scanner

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<\ufdd0]+)")


def parse_harmony(source: Scanner, out: ParsedOutput, marks: Marks, prompt_end: str) -> Scan[None]:
    """Read one message after the other, beginning within the one that the prompt has begun."""
    header, body = _begun(prompt_end)
    if not body:
        header += yield from _first_header(source, marks)
    while (yield from _read_body(source, out, marks, header)) and not out.is_over:
        header = yield from _read_header(source, marks)


def _begun(prompt_end: str) -> tuple[str, bool]:
    """Return the header of the message that the prompt's end has begun, and whether its text has begun too."""
    message = prompt_end.rpartition(START)[2]
    header, mark, _ = message.partition(MESSAGE)
    return header, bool(mark)


def _first_header(source: Scanner, marks: Marks) -> Scan[str]:
    """Read the first header; a completion without one is all answer."""
    source.hold()
    yield from source.blank()
    begins = tuple(map(marks, (START, CHANNEL, MESSAGE, "to=")))
    begin = yield from source.accept(*begins)
    source.rewind()
    return (yield from _read_header(source, marks)) if begin else ""


def _read_header(source: Scanner, marks: Marks) -> Scan[str]:
    """Read up to the text of a message; a header that breaks off says nothing to anybody."""
    read: list[str] = []
    yield from source.until(read.append, marks(MESSAGE))
    header = "".join(read)
    for mark in MARKS:
        header = header.replace(marks(mark), mark)
    return header


def _read_body(source: Scanner, out: ParsedOutput, marks: Marks, header: str) -> Scan[bool]:
    """Read the text of a message to its end; return whether another message may follow."""
    ends = tuple(map(marks, (END, CALL, RETURN, START)))
    channel = _CHANNEL.search(header)
    recipient = _RECIPIENT.search(header)
    kind = channel.group(1) if channel else "final"
    if recipient and out.open_call(recipient.group(1)):
        mark = yield from source.until(out.arguments, *ends)
        out.close_call()
    elif kind == "analysis":
        out.begin_reasoning()
        mark = yield from source.until(lambda text: out.reasoning(hide_tokens(text)), *ends)
        if mark is not None:
            out.end_reasoning()
    else:
        mark = yield from source.until(lambda text: out.text(hide_tokens(text)), *ends)
    return mark is not None
