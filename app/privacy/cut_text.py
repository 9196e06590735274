"""Judges the end of a text that breaks off: an entity may have begun there that the rest would have shown."""

from __future__ import annotations

import re

from app.privacy.emails import EMAIL_REACH, open_email
from app.privacy.numbers import IBAN_REACH, iban_open
from app.privacy.shadow_text import SPOKEN_AT, SPOKEN_DOT

_DIGITS_SHOWN = 4
"""A number of so many digits, such as a year, says too little of a card, phone or account number to be left out; in
groups, such as a decimal or the numbers of a list, it is one less."""
_HARMLESS_TAIL = re.compile(
    rf"[^\w@]*+(?:[0-9]{{0,{_DIGITS_SHOWN}}}|[0-9](?:[^\w@]*[0-9]){{1,{_DIGITS_SHOWN - 2}}}"
    r"|[^\W\d_]++(?:(?:['\u2019\-]|[^\w@]+)[^\W\d_]++)*+)[^\w@]*+"
)
_WRITTEN_OUT = re.compile(
    rf"(?<![^\W_])dot(?![^\W_])|[{SPOKEN_AT}{SPOKEN_DOT}]|[^\W\d][.+%]\w|\w[.+%][^\W\d]", re.IGNORECASE
)
"""An address in words, or the form of a local part; in a text that is not cut this is only the beginning of one."""
_KEY_PREFIX = re.compile(r"(?<![A-Za-z0-9])(?:[srp]k[-_]|llm_|hf_|gh[a-z]_|github_|glpat|A[KS]IA|AIza|xox|eyJ)")
_ENDS = (
    re.compile(r"[0-9+(][0-9+ \t\r\n()./,|_\-]*+\Z"),  # a number in groups
    re.compile(r"\S+(?: dot)?\Z", re.IGNORECASE),  # a word; what stands for a sign in it has no space in a shadow
    re.compile(r"-----BEGIN[A-Z0-9 \-]*+(?:\\[nr]|\s)*+\S*\Z"),
)
"""The last of a text that one entity could be a part of, by its kind; `open_email` finds that of an address."""
_WORD_AT_ONCE = re.compile(r"\S*?\w")


def cut_from(tail: str, *, continues: bool) -> int:
    """Return from where to leave out an undecided end of a shadow, where a text was cut; its length keeps all of it.

    Plain words and numbers of up to four digits are not taken for the beginning of an entity: they end most texts that
    are cut, and show little.  Whatever has a form that the entities have (an "@", the prefix of a key, more digits) is.

    Args: continues: whether an entity ends where the tail begins, which its first word may belong to.
    """
    if continues and _WORD_AT_ONCE.match(tail):
        return 0
    starts = [end.start() for pattern in _ENDS if (end := pattern.search(tail))]
    # Signs in words, in brackets or beside a line end have more of the address before them than one word.
    starts.append(len(tail) - open_email(tail[-EMAIL_REACH:]))
    found = (start for start in starts if not _is_harmless(tail[start:]))
    return min([*found, iban_open(tail, max(0, len(tail) - IBAN_REACH))])


def _is_harmless(end: str) -> bool:
    return bool(_HARMLESS_TAIL.fullmatch(end)) and not (_WRITTEN_OUT.search(end) or _KEY_PREFIX.search(end))
