"""Judges the end of a text that breaks off: an entity may have begun there that the rest would have shown."""

from __future__ import annotations

import re

from app.privacy.shadow_text import SPOKEN_AT, SPOKEN_DOT

_DIGITS_SHOWN = 4
"""A number of so many digits, such as a year, says too little of a card, phone or account number to be left out; in
groups, such as a decimal or the numbers of a list, it is one less."""
_HARMLESS_TAIL = re.compile(
    rf"[^\w@]*+(?:[0-9]{{0,{_DIGITS_SHOWN}}}|[0-9](?:[^\w@]*[0-9]){{1,{_DIGITS_SHOWN - 2}}}"
    r"|[^\W\d_]++(?:(?:['\u2019\-]|[^\w@]+)[^\W\d_]++)*+)[^\w@]*+"
)
_WRITTEN_OUT = re.compile(
    rf"(?<![^\W_])(?:at|dot)(?![^\W_])|[{SPOKEN_AT}{SPOKEN_DOT}]|[^\W\d][.+%]\w|\w[.+%][^\W\d]", re.IGNORECASE
)
"""An address in words, or the form of a local part; in a text that is not cut this is only the beginning of one."""
_KEY_PREFIX = re.compile(r"(?<![A-Za-z0-9])(?:[srp]k[-_]|llm_|hf_|gh[a-z]_|github_|glpat|A[KS]IA|AIza|xox|eyJ)")
_WORD_WITHOUT_SPACE = re.compile(r"\S*?\w")


def may_begin(tail: str, *, continues: bool) -> bool:
    """Return whether an undecided end of a shadow, where a text was cut, may be a part of an entity.

    Plain words and numbers of up to four digits are not taken for one: they end most texts that are cut, and show
    little.  Whatever has a form that the entities have (an "@", the prefix of a key, more digits) is.

    Args: continues: whether an entity ends where the tail begins, which its first word may belong to.
    """
    if continues and _WORD_WITHOUT_SPACE.match(tail):
        return True
    return not _HARMLESS_TAIL.fullmatch(tail) or bool(_WRITTEN_OUT.search(tail) or _KEY_PREFIX.search(tail))
