"""Normalises text for PII matching: the shadow, a copy in which look-alike characters are replaced by ASCII ones.

The shadow has one character per visible character of the original: full-width, Arabic, circled and mathematical forms
become ASCII, every space a space and every hyphen a hyphen.  Invisible characters are removed, except the 17th and
later ones of a run, which remain and so separate words; that limit bounds the length of an entity in the original.
What stands for "@" or a full stop in a disguised address is replaced by it, and by fillers up to its length.
`redactor.py` finds entities in the shadow and replaces them in the original.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

IGNORABLE_RUN = 16
"""Consecutive invisible characters that are ignored; a longer run separates words."""

# Placeholder of every invisible character until the runs are counted.  It is invisible itself: no visible text is lost.
_INVISIBLE = "\u200b"
_RUN = re.compile(f"{_INVISIBLE}+")

# Invisible, but not in the categories Cf, Mn and Me: fillers without a glyph.
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")

# Not changed by NFKC, but read as a hyphen (minus, modifier, bullet, prolonged sound) or as a full stop.
_HYPHENS = frozenset("\u2212\u02d7\u2043\u30fc\uff70")
_FULL_STOPS = frozenset("\u3002\uff61")

FILLER, SPOKEN_AT, SPOKEN_DOT = "\ue000", "\ue001", "\ue002"
"""Private characters, which no shadow has otherwise: the rest of a longer sign; the words "at" and "dot"."""

# Begins with a set of characters, which is searched for six times as fast as alternatives are.
_DISGUISED = re.compile(
    r"[%&\[({<][ \t]?(?:(?P<at>(?<=%)40|(?<=&)(?:#0{0,5}64|#[xX]0{0,5}40|commat);|(?:[aA][tT]|@)[ \t]?[\])}>])"
    r"|(?<=%)2[eE]|(?<=&)(?:#0{0,5}46|#[xX]0{0,5}2[eE]|period);|(?:[dD][oO][tT]|\.)[ \t]?[\])}>])"
)
# Of several in a row none is a sign: which one is would depend on where a stream has cut the text before them.
_SPOKEN = re.compile(r"(?<!\bat)(?<!\bdot) (?:(?P<at>at)|dot) (?!(?:at|dot) )", re.IGNORECASE)

_CACHED_CHARACTERS = 4096


def _plain(character: str) -> str:
    """Return the ASCII look-alike or compatibility form of `character`, or itself.

    Source: compatibility forms (NFKC), Unicode Standard Annex 15.  A form of several characters ("Tel", "10.") is
    ignored, so that every character of the shadow corresponds to exactly one of the original.
    """
    category = unicodedata.category(character)
    if category in ("Cf", "Mn", "Me") or character in _FILLERS:
        return _INVISIBLE
    if category == "Zs":
        return " "
    if category == "Co":
        return "\ufffd"
    if category == "Pd" or character in _HYPHENS:
        return "-"
    if character in _FULL_STOPS:
        return "."
    digit = unicodedata.digit(character, None)
    if digit is not None:
        return str(digit)
    compatible = unicodedata.normalize("NFKC", character)
    return compatible if len(compatible) == 1 else character


def _undisguised(text: str) -> str:
    """Return a text of the same length with "@" and "." in place of what stands for them in disguised addresses.

    " at " and " dot " are ordinary words: they are marked, and only in a text that has both.
    """
    parts, done = list[str](), 0
    for found in _DISGUISED.finditer(text):
        start, end = found.span()
        if found[0][0] in "[({<":
            start -= start > done and text[start - 1] in " \t"
            end += text[end : end + 1] in (" ", "\t")
        parts += text[done:start], ("@" if found["at"] else ".").ljust(end - start, FILLER)
        done = end
    if parts:
        text = "".join([*parts, text[done:]])
    return _SPOKEN.sub(_spoken, text) if " dot " in text.lower() else text


def _spoken(found: re.Match[str]) -> str:
    return (SPOKEN_AT if found["at"] else SPOKEN_DOT).ljust(len(found[0]), FILLER)


class _PlainTable(dict[int, str]):
    """A `str.translate` table that fills itself on demand; bounded, so that unusual texts cannot fill the memory."""

    def __missing__(self, code: int) -> str:
        plain = chr(code) if code < 0x80 else _plain(chr(code))
        if len(self) < _CACHED_CHARACTERS:
            self[code] = plain
        return plain


_PLAIN = _PlainTable()


@dataclass(frozen=True, slots=True)
class Shadow:
    """The normalised copy of a text, with the offset of each character in the original."""

    text: str
    origins: list[int] | None
    """Offset in the original of each character of `text`; None if all offsets are equal."""
    size: int
    """Length of the original."""
    trailing: int
    """Invisible characters at the end of the original, counted to one past the limit."""

    @classmethod
    def of(cls, original: str, invisible_before: int = 0) -> Shadow:
        """Return the shadow of `original`, which `invisible_before` invisible characters directly precede."""
        if original.isascii():
            return cls(_undisguised(original), None, len(original), 0 if original else invisible_before)
        plain = original.translate(_PLAIN)
        if _INVISIBLE not in plain:
            return cls(_undisguised(plain), None, len(plain), 0)
        origins: list[int] = []
        visible_from = trailing = 0
        for run in _RUN.finditer(plain):
            start, end = run.span()
            already = invisible_before if start == 0 else 0
            origins.extend(range(visible_from, start))
            origins.extend(range(min(end, start + max(0, IGNORABLE_RUN - already)), end))
            visible_from = end
            if end == len(plain):
                trailing = min(already + end - start, IGNORABLE_RUN + 1)
        origins.extend(range(visible_from, len(plain)))
        visible = "".join([plain[offset] for offset in origins])
        return cls(_undisguised(visible), origins, len(plain), trailing)

    def origin(self, index: int) -> int:
        """Return the offset in the original of the character at `index`."""
        return index if self.origins is None else self.origins[index]

    def cut(self, index: int) -> tuple[int, int]:
        """Return where the rest from `index` on begins in the original, and `invisible_before` of the rest.

        Invisible characters just before `index` belong to the first part.
        """
        if index == len(self.text):
            return self.size, self.trailing
        return self.origin(index), IGNORABLE_RUN + 1 if self.text[index] == _INVISIBLE else 0

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return the original's offsets of `text[start:end]`, which is not empty, without invisible edges."""
        return self.origin(start), self.origin(end - 1) + 1
