"""The text of a completion as a parser reads it, while it is still being generated.

A parser is a generator that yields wherever it needs more text, so that it reads as if all text were there.  Whatever
way the text is cut, it sees the same.
"""

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

from app.engine.tokenizer.shown_tokens import BEGIN, END

T = TypeVar("T")
Scan = Generator[None, None, T]
"""A step of a parser, which returns a T once enough text has come."""
Write = Callable[[str], None]

_BLANK = re.compile(r"\s*")


class Scanner:
    """Holds the text that has come and not been read."""

    def __init__(self) -> None:
        self._text = ""
        self._read = 0
        """How many characters of `_text` have been read."""
        self._before = 0
        """Characters of the completion before `_text`."""
        self._checkpoint: int | None = None
        self._ended = False
        self.is_cut = False
        """Whether the text has ended where the model would have gone on."""

    @property
    def position(self) -> int:
        """Return how many characters of the completion have been read."""
        return self._before + self._read

    def feed(self, text: str) -> None:
        """Append more text."""
        unneeded = self._read if self._checkpoint is None else self._checkpoint
        self._text = self._text[unneeded:] + text
        self._before += unneeded
        self._read -= unneeded
        if self._checkpoint is not None:
            self._checkpoint = 0

    def end(self, *, cut: bool) -> None:
        """Declare that no more text comes.  Args: cut: whether the model would have gone on."""
        self._ended, self.is_cut = True, cut

    def hold(self) -> None:
        """Remember this place for `rewind`."""
        self._checkpoint = self._read

    def release(self) -> None:
        """Forget the place that was remembered."""
        self._checkpoint = None

    def rewind(self) -> None:
        """Read again from the place that was remembered, if one was."""
        if self._checkpoint is not None:
            self._read = self._checkpoint
            self._checkpoint = None

    def more(self) -> Scan[bool]:
        """Wait for more text; return False once none comes."""
        if self._ended:
            return False
        yield
        return True

    def peek(self, characters: int) -> Scan[str]:
        """Return the next so many characters without reading them; fewer at the end of the text."""
        while len(self._text) - self._read < characters and (yield from self.more()):
            pass
        return self._text[self._read : self._read + characters]

    def take(self, characters: int) -> str:
        """Read so many characters, which have been seen with `peek`."""
        taken = self._text[self._read : self._read + characters]
        self._read += len(taken)
        return taken

    def unread(self, text: str) -> None:
        """Put back what has just been read."""
        self._read -= len(text)

    def take_before(self, sign: re.Pattern[str]) -> tuple[str, str]:
        """Read what has come up to the first character that matches.  Returns: that text, and the sign, if any."""
        found = sign.search(self._text, self._read)
        end = found.start() if found else len(self._text)
        text, self._read = self._text[self._read : end], end
        return text, found.group() if found else ""

    def blank(self) -> Scan[str]:
        """Read white space."""
        blank = ""
        while True:
            found = _BLANK.match(self._text, self._read)
            assert found is not None  # noqa: S101  # it matches nothing at all, too
            blank += found.group()
            self._read = found.end()
            if self._read < len(self._text) or not (yield from self.more()):
                return blank

    def accept(self, *marks: str) -> Scan[str | None]:
        """Read one of these marks if it comes next; return which, or None."""
        while True:
            rest = self._text[self._read : self._read + max(map(len, marks))]
            for mark in marks:
                if rest.startswith(mark):
                    self._read += len(mark)
                    return mark
            if not any(mark.startswith(rest) for mark in marks) or not (yield from self.more()):
                return None

    def until(self, write: Write, *marks: str) -> Scan[str | None]:
        """Read up to the first of these marks, and the mark; `write` gets the text before it.

        Returns: the mark; None: the text ended.
        """
        finder = _finder(marks)
        while True:
            found = finder.search(self._text, self._read)
            end = found.start() if found else _safe_end(self._text, self._read, marks)
            self._pass(end, write)
            if found:
                self._read = found.end()
                return found.group()
            if not (yield from self.more()):
                self._pass(len(self._text), write)
                return None

    def _pass(self, end: int, write: Write) -> None:
        text, self._read = self._text[self._read : end], end
        if text:
            write(text)


@lru_cache(maxsize=256)
def _finder(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")


@lru_cache(maxsize=256)
def _beginnings(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(sorted({re.escape(mark[0]) for mark in marks})) or "(?!)")


def _safe_end(text: str, start: int, marks: tuple[str, ...]) -> int:
    """Return where the longest end of the text begins that could still become a mark, or the name of a token."""
    longest = max(map(len, marks), default=1)
    token = text.rfind(BEGIN, start)
    end = token if token >= 0 and END not in text[token:] else len(text)
    for found in _beginnings(marks).finditer(text, max(start, len(text) - longest + 1), end):
        if any(mark.startswith(text[found.start() :]) for mark in marks):
            return found.start()
    return end


def ignore(text: str) -> None:
    """Write nowhere."""
