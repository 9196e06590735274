"""Redacts a stream of JSON inside its strings only, so that what was JSON stays JSON.

Punctuation, literals and bare numbers pass as they are.  Each string is redacted by itself as the characters that it
stands for, and written again; an entity never swallows a quote or half of an escape.  From where a text turns out not
to be JSON it is redacted like any other.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redaction, Redactor, StreamRedactor

CONTEXT_CHARS = 64
"""How much in front of a string is looked at: its name in the object says what a number is."""
STRINGS_PER_TURN = 32
"""Then the event loop gets its turn."""

_HEX = "[0-9a-fA-F]"
_HIGH, _LOW = f"[dD][89abAB]{_HEX}{{2}}", f"[dD][c-fC-F]{_HEX}{{2}}"
_INSIDE = re.compile(rf'(?:[^"\\]+|\\["\\/bfnrt]|\\u(?!{_HIGH}){_HEX}{{4}}|\\u{_HIGH}\\u{_LOW})+')
"""Complete characters of a string."""
_UNFINISHED = re.compile(rf"\\(?:u(?:{_HEX}{{0,3}}|{_HIGH}(?:\\(?:u(?:[dD](?:[c-fC-F]{_HEX}?)?)?)?)?)?)?")
"""A character of a string that later text may complete."""
_ONE_ESCAPE = re.compile(rf"\\u{_HEX}{{4}}")
_PUNCTUATION = re.compile(r"[ \t\r\n{}\[\]:,]+")
_WORD = re.compile(r'[^ \t\r\n{}\[\]:,"]+')
_SCALAR = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
_BEGUN_SCALAR = re.compile(r"-?[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]*)?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonRedactor:
    """Redacts one JSON text that comes in deltas; the joined output is the same for every chunking."""

    def __init__(self, redactor: Redactor, pool: RedactionPool, tenant: Hashable, context: str = "") -> None:
        """Args: pool: redacts with `redactor`, as whose turn `tenant` says; context: the text in front of the JSON."""
        self._redactor, self._pool, self._tenant = redactor, pool, tenant
        self._mode: Literal["outside", "string", "text"] = "outside"
        self._held = ""
        """The beginning of a word or an escape that is not complete."""
        self._value_may_follow = True
        self._stream = StreamRedactor(redactor)
        self._context = context
        """The end of what was written so far."""
        self._counts: Counter[PiiKind] = Counter()
        self._strings = 0

    @property
    def counts(self) -> dict[PiiKind, int]:
        """Return how many entities of each kind were replaced so far; kinds without any are absent."""
        return dict(self._counts + Counter(self._stream.counts))

    async def feed(self, delta: str) -> str:
        """Consume the next delta and return the text that may be sent now.

        Raises: RedactionFailedError: it cannot be redacted.
        """
        rest, self._held = self._held + delta, ""
        written = ""
        while rest:
            if self._mode == "text":
                return written + self._write(await self._pool.feed(self._tenant, self._stream, rest))
            part, rest = await self._string(rest) if self._mode == "string" else self._outside(rest)
            written += self._write(part)
            if self._held:
                break
        return written

    def finish(self, *, cut: bool = False) -> str:
        """End the text and return what is withheld.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        """
        held, self._held = self._held, ""
        if self._mode == "string":
            return characters_in_json(self._stream.finish(cut=cut))
        if self._mode == "outside" and (_SCALAR.fullmatch(held) or (cut and _BEGUN_SCALAR.fullmatch(held))):
            return held
        if self._mode == "outside":
            self._begin("text")
        return self._stream.feed(held) + self._stream.finish(cut=cut)

    def _write(self, text: str) -> str:
        self._context = (self._context + text)[-CONTEXT_CHARS:]
        return text

    def _begin(self, mode: Literal["string", "text"], mark: str = "") -> None:
        """Go on in another mode.  Args: mark: what stands between what was written and what comes next."""
        self._counts.update(self._stream.counts)
        self._mode, self._stream = mode, StreamRedactor(self._redactor, self._context + mark)

    def _outside(self, rest: str) -> tuple[str, str]:
        """Take the next part of what stands outside of strings.  Returns: what to write, and the rest."""
        if found := _PUNCTUATION.match(rest):
            marks = found[0].strip()
            self._value_may_follow = marks[-1] in "[{:," if marks else self._value_may_follow
            return found[0], rest[found.end() :]
        if rest[0] == '"':
            self._begin("string", '"')
            self._value_may_follow = False
            return '"', rest[1:]
        found = _WORD.match(rest)
        word = found[0] if found else rest
        if self._value_may_follow and len(word) == len(rest):
            self._held = word
            return "", ""
        if self._value_may_follow and _SCALAR.fullmatch(word):
            self._value_may_follow = False
            return word, rest[len(word) :]
        self._begin("text")
        return "", rest

    async def _string(self, rest: str) -> tuple[str, str]:
        """Take the next part of a string.  Returns: what to write, and the rest."""
        if rest[0] == '"':
            tail = characters_in_json(self._stream.finish())
            self._mode = "outside"
            self._strings += 1
            if self._strings % STRINGS_PER_TURN == 0:
                await asyncio.sleep(0)
            return f'{tail}"', rest[1:]
        if found := _INSIDE.match(rest):
            characters, end = json.loads(f'"{found[0]}"', strict=False), found.end()
        elif _UNFINISHED.fullmatch(rest):
            self._held = rest
            return "", ""
        elif found := _ONE_ESCAPE.match(rest):  # half of a surrogate pair
            characters, end = chr(int(found[0][2:], 16)), found.end()
        else:  # no escape of JSON; it is taken for what it looks like
            characters, end = rest[0], 1
        return characters_in_json(await self._pool.feed(self._tenant, self._stream, characters)), rest[end:]


def characters_in_json(characters: str) -> str:
    """Return characters as they stand in a string of JSON; half of a surrogate pair, which is no text, escaped."""
    written = json.dumps(characters, ensure_ascii=False)[1:-1]
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", written)


class TaggedRedactor:
    """Redacts free text in which each of certain marks is followed by one JSON value, as structural tags have it.

    The joined output is the same for every chunking.
    """

    def __init__(self, redactor: Redactor, pool: RedactionPool, tenant: Hashable, marks: Sequence[str]) -> None:
        """Args: as `JsonRedactor` takes them; marks: what begins JSON, none of them empty."""
        self._redactor, self._pool, self._tenant = redactor, pool, tenant
        self._marks = sorted(marks, key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, self._marks)))
        self._text = StreamRedactor(redactor)
        self._json: JsonRedactor | None = None
        self._value = _ValueEnd()
        self._held = ""
        """The end of the text that may be the beginning of a mark."""
        self._context = ""
        self._earlier: Counter[PiiKind] = Counter()

    @property
    def counts(self) -> dict[PiiKind, int]:
        """Return how many entities of each kind were replaced so far; kinds without any are absent."""
        current = self._text if self._json is None else self._json
        return dict(self._earlier + Counter(current.counts))

    async def feed(self, delta: str) -> str:
        """Consume the next delta and return the text that may be sent now.

        Raises: RedactionFailedError: it cannot be redacted.
        """
        rest, self._held = self._held + delta, ""
        written = ""
        while rest:
            part, rest = await (self._free(rest) if self._json is None else self._tagged(self._json, rest))
            self._context = (self._context + part)[-CONTEXT_CHARS:]
            written += part
            if self._held:
                break
        return written

    def finish(self, *, cut: bool = False) -> str:
        """End the text and return what is withheld.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        """
        if self._json is not None:
            return self._json.finish(cut=cut)
        held, self._held = self._held, ""
        return self._text.feed(held) + self._text.finish(cut=cut)

    async def _free(self, rest: str) -> tuple[str, str]:
        """Take free text, as far as the end of a mark.  Returns: what to write, and the rest."""
        found = self._mark.search(rest)
        begin = len(rest) if found is None else found.start()
        held = self._begun_mark(rest, begin)
        if held is not None:
            self._held, found, rest = rest[held:], None, rest[:held]
        end = len(rest) if found is None else found.end()
        written = await self._pool.feed(self._tenant, self._text, rest[:end])
        if found is None:
            return written, ""
        written += self._text.finish()
        self._earlier.update(self._text.counts)
        context = (self._context + written)[-CONTEXT_CHARS:]
        self._json, self._value = JsonRedactor(self._redactor, self._pool, self._tenant, context), _ValueEnd()
        return written, rest[end:]

    def _begun_mark(self, rest: str, end: int) -> int | None:
        """Return where a mark may begin, at `end` or before, that later text would complete; None if none does."""
        longest = len(self._marks[0])
        for start in range(max(0, len(rest) - longest + 1), min(end + 1, len(rest))):
            if any(len(mark) > len(rest) - start and mark.startswith(rest[start:]) for mark in self._marks):
                return start
        return None

    async def _tagged(self, value: JsonRedactor, rest: str) -> tuple[str, str]:
        """Take the next part of a JSON value.  Returns: what to write, and the rest."""
        end = self._value.find(rest)
        if end is None:
            return await value.feed(rest), ""
        written = await value.feed(rest[:end]) + value.finish()
        self._earlier.update(value.counts)
        self._json, self._text = None, StreamRedactor(self._redactor, self._context + written)
        return written, rest[end:]


class _ValueEnd:
    """Finds where one JSON value ends in a text that comes in deltas."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._in_scalar = False

    def find(self, delta: str) -> int | None:
        """Return how many characters of the next delta belong to the value; None while it may go on."""
        for i, character in enumerate(delta):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
                closed = not self._in_string
            elif character in "{[" or (self._depth and character in "]}"):
                self._depth += 1 if character in "{[" else -1
                closed = True
            elif self._depth:
                self._in_string, closed = character == '"', False
            elif self._in_scalar or character not in ' \t\r\n"':
                # A bare number or word at the top ends with the first character that cannot be in it.
                if not (character.isalnum() or character in "+-."):
                    return i
                self._in_scalar, closed = True, False
            else:
                self._in_string, closed = character == '"', False
            if closed and not self._depth:
                return i + 1
        return None


async def redact_json(
    pool: RedactionPool, redactor: Redactor, tenant: Hashable, text: str, *, cut: bool = False
) -> Redaction:
    """Return a whole text of JSON without personal data in its strings.

    Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
    Raises: RedactionFailedError: it cannot be redacted.
    """
    stream = JsonRedactor(redactor, pool, tenant)
    clean = await stream.feed(text) + stream.finish(cut=cut)
    return Redaction(clean, stream.counts)
