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
from collections.abc import Hashable
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

    def __init__(self, redactor: Redactor, pool: RedactionPool, tenant: Hashable) -> None:
        """Args: pool: redacts with `redactor`, as whose turn `tenant` says."""
        self._redactor, self._pool, self._tenant = redactor, pool, tenant
        self._mode: Literal["outside", "string", "text"] = "outside"
        self._held = ""
        """The beginning of a word or an escape that is not complete."""
        self._value_may_follow = True
        self._stream = StreamRedactor(redactor)
        self._context = ""
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
            return _encoded(self._stream.finish(cut=cut))
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
            tail = _encoded(self._stream.finish())
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
        return _encoded(await self._pool.feed(self._tenant, self._stream, characters)), rest[end:]


def _encoded(characters: str) -> str:
    """Return characters as they stand in a string of JSON."""
    written = json.dumps(characters, ensure_ascii=False)[1:-1]
    return _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", written)


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
