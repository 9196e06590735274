"""Reads JSON from a completion while it is being generated, and hands it on exactly as it is written."""

import json
import re

from app.engine.parsing.scanner import Scan, Scanner, Write

_SIGN = re.compile(r"[^\s\w:,.+\-]")
"""What cannot be a part of a number, a literal or a separator."""
_IN_STRING = re.compile('["\\\\\ufdd0]')
_AFTER_SCALAR = re.compile(r"[^\w.+\-]")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_CLOSING = {"{": "}", "[": "]"}
_MAX_SCALAR_CHARS = 400


def read_value(source: Scanner, write: Write) -> Scan[bool]:
    """Read one JSON value; return False where it breaks off or is none, and leave what follows unread."""
    first = yield from source.peek(1)
    if first == '"':
        return (yield from _string(source, write))
    if first in _CLOSING:
        return (yield from _container(source, write))
    return (yield from _scalar(source, write))


def read_string(source: Scanner) -> Scan[str | None]:
    """Read one JSON string and return what it stands for; None: it is none."""
    if (yield from source.peek(1)) != '"':
        return None
    raw: list[str] = []
    if not (yield from _string(source, raw.append)):
        return None
    return string_value("".join(raw))


def string_value(raw: str) -> str | None:
    """Return what a JSON string stands for; None: it is none."""
    try:
        value = json.loads(raw, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _container(source: Scanner, write: Write) -> Scan[bool]:
    closing: list[str] = []
    while True:
        text, sign = source.take_before(_SIGN)
        if text:
            write(text)
        if not sign:
            if not (yield from source.more()):
                return False
        elif sign == '"':
            if not (yield from _string(source, write)):
                return False
        elif sign in _CLOSING:
            closing.append(_CLOSING[sign])
            write(source.take(1))
        elif sign == closing[-1]:
            closing.pop()
            write(source.take(1))
            if not closing:
                return True
        else:
            return False


def _string(source: Scanner, write: Write) -> Scan[bool]:
    write(source.take(1))
    while True:
        text, sign = source.take_before(_IN_STRING)
        if text:
            write(text)
        if sign == '"':
            write(source.take(1))
            return True
        if sign == "\\":
            escape = yield from source.peek(2)
            write(source.take(len(escape)))
        elif sign or not (yield from source.more()):
            return False


def _scalar(source: Scanner, write: Write) -> Scan[bool]:
    scalar = ""
    while len(scalar) < _MAX_SCALAR_CHARS:
        text, sign = source.take_before(_AFTER_SCALAR)
        scalar += text
        if sign or not (yield from source.more()):
            break
    write(scalar)
    return _SCALAR.fullmatch(scalar) is not None
