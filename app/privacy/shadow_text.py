"""Decide how a text looks to the PII patterns: the shadow, a plain copy in which look-alikes are written in ASCII.

The shadow has one character per visible character of the original: full-width, Arabic, circled and mathematical forms
become the ASCII ones, every space a space, every hyphen a hyphen, and invisible characters vanish, but for the 17th and
later ones of a run, which stay and so separate words.  That limit bounds how long an entity can be in the original.
It does not know what an entity is.  `pii.py` looks for entities in the shadow and cuts them out of the original.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

IGNORABLE_RUN = 16
"""Invisible characters in a row that are looked through; a longer run separates words."""

# Stands for every invisible character until the runs are counted.  It is one itself, so no visible text is lost.
_INVISIBLE = "\u200b"
_RUN = re.compile(f"{_INVISIBLE}+")

# Invisible, but not in the categories Cf, Mn and Me: fillers that fonts draw as nothing.
_FILLERS = frozenset("\u115f\u1160\u3164\uffa0")

# What NFKC leaves alone although it reads as a hyphen (minus, modifier, bullet, prolonged sound) or as a full stop.
_HYPHENS = frozenset("\u2212\u02d7\u2043\u30fc\uff70")
_FULL_STOPS = frozenset("\u3002\uff61")

_REMEMBERED_CHARACTERS = 4096


def _plain(character: str) -> str:
    """The one character that `character` reads as; itself where it has no plainer form.

    Source: compatibility forms (NFKC), Unicode Standard Annex 15.  A form of several characters ("Tel", "10.") is not
    taken, so that every character of the shadow belongs to exactly one of the original.
    """
    category = unicodedata.category(character)
    if category in ("Cf", "Mn", "Me") or character in _FILLERS:
        return _INVISIBLE
    if category == "Zs":
        return " "
    if category == "Pd" or character in _HYPHENS:
        return "-"
    if character in _FULL_STOPS:
        return "."
    digit = unicodedata.digit(character, None)
    if digit is not None:
        return str(digit)
    compatible = unicodedata.normalize("NFKC", character)
    return compatible if len(compatible) == 1 else character


class _PlainTable(dict[int, str]):
    """`str.translate` table that learns characters as it meets them; bounded, so that odd texts cannot fill memory."""

    def __missing__(self, code: int) -> str:
        plain = chr(code) if code < 0x80 else _plain(chr(code))
        if len(self) < _REMEMBERED_CHARACTERS:
            self[code] = plain
        return plain


_PLAIN = _PlainTable()


@dataclass(frozen=True, slots=True)
class Shadow:
    """The plain copy of a text, and where its characters came from."""

    text: str
    origins: list[int] | None
    """For each character of `text` its offset in the original; None where the two offsets are the same."""
    size: int
    """Length of the original."""
    trailing: int
    """Invisible characters that the original ends with, counted to one past the limit."""

    @classmethod
    def of(cls, original: str, invisible_before: int = 0) -> Shadow:
        """Make the shadow of `original`, a text that `invisible_before` invisible characters directly precede."""
        if original.isascii():
            return cls(original, None, len(original), 0 if original else invisible_before)
        plain = original.translate(_PLAIN)
        if _INVISIBLE not in plain:
            return cls(plain, None, len(plain), 0)
        kept: list[int] = []
        visible_from = trailing = 0
        for run in _RUN.finditer(plain):
            start, end = run.span()
            already = invisible_before if start == 0 else 0
            kept.extend(range(visible_from, start))
            kept.extend(range(min(end, start + max(0, IGNORABLE_RUN - already)), end))
            visible_from = end
            if end == len(plain):
                trailing = min(already + end - start, IGNORABLE_RUN + 1)
        kept.extend(range(visible_from, len(plain)))
        return cls("".join([plain[offset] for offset in kept]), kept, len(plain), trailing)

    def origin(self, index: int) -> int:
        """The offset in the original of the character at `index`."""
        return index if self.origins is None else self.origins[index]

    def cut(self, index: int) -> tuple[int, int]:
        """Where to cut the original so that its rest begins at `index`: the offset, and `invisible_before` of the rest.

        Invisible characters just before `index` stay with the first part.
        """
        if index == len(self.text):
            return self.size, self.trailing
        return self.origin(index), IGNORABLE_RUN + 1 if self.text[index] == _INVISIBLE else 0

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The original's offsets of `text[start:end]`, which is not empty; invisible edges are left out."""
        return self.origin(start), self.origin(end - 1) + 1
