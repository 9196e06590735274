"""Matches e-mail addresses in a shadow text: plain, in quotes, in other scripts, disguised, and broken by a line end.

An address is found from its "@", or from what stands for it (`shadow_text.py`).  How an address may be written depends
on that sign: the words "at" and "dot" are only taken together, with a domain as people read it out.
"""

from __future__ import annotations

import re

from app.privacy.shadow_text import FILLER, SPOKEN_AT, SPOKEN_DOT

LOCAL_PART = 64
"""Longest local part of an e-mail address, RFC 5321, section 4.5.3.1.1."""
EMAIL_REACH = LOCAL_PART + 12 + 8 * 76 + 66
"""Longest address: local part, sign, labels with what stands for their full stops, top-level domain."""
UNSPACED_LOCAL_PART = 20
"""Longest local part in a script without capital letters: some have no spaces, and all before would be a part of it."""
_QUOTED_LOCAL_PART = 42

# Latin, Greek and Cyrillic letters; then those of scripts without capitals, from Armenian to Hangul.
LETTER = "A-Za-z\u00c0-\u024f\u0370-\u052f"
OTHER_LETTER = (
    "\u0531-\u0587\u05d0-\u05ea\u0620-\u064a\u066e-\u06d3\u06fa-\u06fc\u0904-\u0963\u0971-\u0dff\u0e01-\u0e3a"
    "\u0e40-\u0e4e\u0e81-\u0edf\u10a0-\u10fa\u1100-\u11ff\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff\uac00-\ud7a3"
)
LOCAL_CHARACTER = rf"[{LETTER}0-9._%+'\-{FILLER}]"
_OTHER_CHARACTER = rf"[{OTHER_LETTER}0-9._%+\-{FILLER}]"

_COMMON = (
    "com|org|net|edu|gov|info|io|dev|app|ai|me|co|uk|de|fr|it|es|nl|be|at|ch|eu|us|ca|au|in|jp|cn|ru|pl|pt|br|mx|se"
)
_OTHER_DOMAINS = (
    "中国|中國|香港|台灣|台湾|公司|网络|網絡|在线|中文网|网址|广告|みんな|コム|한국|닷컴|भारत"  # domains
    "|السعودية|امارات|مصر|ไทย|გე|հայ"
)
_LABEL = rf"(?:[{LETTER}0-9][{LETTER}0-9\-]{{0,62}}|[{OTHER_LETTER}][{OTHER_LETTER}0-9\-]{{0,62}})"
_TOP = rf"(?:[Xx][Nn]--[A-Za-z0-9\-]{{2,59}}|[{LETTER}]{{2,63}}|{_OTHER_DOMAINS}|[{OTHER_LETTER}]{{2,6}})"
_DOMAIN = re.compile(
    rf"{FILLER}{{0,12}}(?:(?:\r?\n)?(?:{_LABEL}\.{FILLER}{{0,12}}){{1,8}}{_TOP}"
    rf"|{_LABEL}\.\r?\n(?:{_LABEL}\.)?(?:{_COMMON})(?![{LETTER}0-9]))"
)
# Read out: "example dot com", at least one full stop of which is a word or in brackets.
_SPOKEN_DOT = rf"(?:{SPOKEN_DOT}{FILLER}{{4}}|\.{FILLER}{{0,12}})"
_SPOKEN_DOMAIN = re.compile(
    rf"{FILLER}{{0,12}}(?:{_LABEL}{_SPOKEN_DOT}){{1,4}}(?:{_COMMON})(?![{LETTER}0-9])", re.IGNORECASE
)
_NO_NAME = re.compile(
    rf"(?:the|an?|this|that|these|it|its|my|your|our|their|his|her|every|each|one|look|looking|stop|back)(?![{LETTER}0-9])",
    re.IGNORECASE,
)
_COMMON_DOMAIN = re.compile(rf".*\.(?:{_COMMON})\Z", re.IGNORECASE | re.DOTALL)

_LOCAL_START = re.compile(rf"[{LETTER}0-9_]")
_LETTER_START = re.compile(rf"[{LETTER}]")
_LOCAL_REVERSED = re.compile(rf"{LOCAL_CHARACTER}{{0,{LOCAL_PART}}}+")
_SPOKEN_LOCAL_REVERSED = re.compile(rf"(?:{LOCAL_CHARACTER}|{SPOKEN_DOT}){{0,{LOCAL_PART}}}+")
_OTHER_REVERSED = re.compile(rf"{_OTHER_CHARACTER}{{0,{UNSPACED_LOCAL_PART}}}+")
_OTHER_SEEN = re.compile(rf"[{OTHER_LETTER}]")
_QUOTED = rf"[{LETTER}0-9._+%'@\-]"
_QUOTED_REVERSED = re.compile(rf"\"(?=[^\"]{{1,{_QUOTED_LOCAL_PART}}}\"){_QUOTED}+(?: {_QUOTED}+){{0,2}}\"")

# A login on a machine and a user of a social network are written like addresses.
_MACHINE_LOGINS = frozenset(("git", "hg", "svn"))
_REMOTE_SHELL = re.compile(
    r"(?:^|[\s`$(\"'\]])(?:ssh|scp|sftp|rsync|mosh|sshfs|ssh-copy-id)"
    r"(?: -[iFoJLRDe] [^\s@\-][^\s@]{0,63}| -{1,2}[A-Za-z][^\s@]*(?: [0-9]{1,5})?)* \Z"
)
_REMOTE_PATH = re.compile(r":[/~]")


def email_around(shadow: str, at: int, floor: int, first: int, left_reach: int) -> tuple[int, int] | None:
    """Return the (start, end) of the e-mail address whose sign is at `at`; it begins at `first` or later.

    Nothing before `floor` is read; the text between `floor` and `first` is only left context.

    A local part of more than 64 characters is not an address, but its last 64 may be: the address begins at the first
    of them where a word, or the letters of a longer word, may begin.
    """
    spoken = shadow[at] == SPOKEN_AT
    domain = (_SPOKEN_DOMAIN if spoken else _DOMAIN).match(shadow, at + 1) or (
        None if spoken else _SPOKEN_DOMAIN.match(shadow, at + 1)
    )
    if domain is None or domain[0].count("\n") > 1:
        return None
    close = _end_of_local_part(shadow, at, floor, domain)
    begin = _start_of_local_part(shadow, close, floor, spoken=spoken)
    if begin is None or (spoken and not _is_spoken(shadow[begin:close], domain[0])):
        return None
    if close == at and _is_login(shadow, begin, at, domain.end(), shadow[max(floor, begin - left_reach) : begin]):
        return None
    disguised = close < at or shadow[at + 1] == FILLER or spoken
    for start in range(max(begin, first), close):
        if shadow[start] == '"' or _OTHER_SEEN.match(shadow, start):
            return start, domain.end()
        # A disguised one begins with a letter: rows of numbers end before a number that may not be part of an entity.
        if not (_LETTER_START if disguised else _LOCAL_START).match(shadow, start):
            continue
        left = shadow[max(floor, start - 8) : start]
        # Inside a word only after a letter that cannot be the end of a rejected number or IPv6 address.
        if not inside_word(shadow, start, left) or (left[-1:].isalpha() and ":" not in left[-5:]):
            return start, domain.end()
    return None


def _end_of_local_part(shadow: str, at: int, floor: int, domain: re.Match[str]) -> int:
    """Return where the local part ends: at the sign, or at the end of the line before it."""
    if at - 1 <= floor or shadow[at - 1] != "\n" or "\n" in domain[0] or not _COMMON_DOMAIN.match(domain[0]):
        return at
    return at - 2 if shadow[at - 2] == "\r" else at - 1


def _start_of_local_part(shadow: str, close: int, floor: int, *, spoken: bool) -> int | None:
    """Return where the characters of a local part that ends at `close` begin; None if there are none."""
    before = shadow[max(floor, close - LOCAL_PART) : close][::-1]
    if before.startswith('"'):
        quoted = _QUOTED_REVERSED.match(before)
        return close - quoted.end() if quoted else None
    run = (_SPOKEN_LOCAL_REVERSED if spoken else _LOCAL_REVERSED).match(before)
    size = run.end() if run else 0
    # Digits and full stops belong to the letters before them, whatever the script.
    if not _LETTER_START.search(before[:size]) and _OTHER_SEEN.match(before, size):
        other = _OTHER_REVERSED.match(before)
        size = other.end() if other else 0
    # A sign before it is no part of it.
    size = len(before[:size].rstrip(FILLER))
    return close - size if size else None


def _is_spoken(local: str, domain: str) -> bool:
    return (
        (SPOKEN_DOT in domain or SPOKEN_DOT in local)
        and not _NO_NAME.match(domain.strip(FILLER))
        and not _NO_NAME.match(local)
    )


def _is_login(shadow: str, begin: int, at: int, end: int, left: str) -> bool:
    """Return whether it is a login on a machine or in a social network: git@host, @user@host, ssh user@host."""
    if shadow[begin:at] in _MACHINE_LOGINS or _REMOTE_PATH.match(shadow, end):
        return True
    if left[-1:] == "@":
        return not re.match(LOCAL_CHARACTER, left[-2:-1])
    return _REMOTE_SHELL.search(left) is not None


# The left context of a position right after a rejected end of a number; see `inside_word`.
_REJECTED_END = re.compile(r"(?:\.[0-9]{1,3}\.|[ \t.\-][0-9]{4}-)\Z")


def inside_word(shadow: str, start: int, left: str) -> bool:
    """Return whether `start` lies inside a longer word or number, where no entity may begin.

    Mirrors the ends that the matchers reject.  If it were laxer, a number rejected because of the text after it would
    be accepted once that text is replaced: redacting the redacted text would find more.
    """
    last = left[-1:]
    if last.isascii() and last.isalnum():
        return True
    return shadow[start] in "0123456789" and _REJECTED_END.search(left) is not None


_WORD_REVERSED = re.compile(
    rf"(?:[{LETTER}0-9._%+'\-{FILLER}{SPOKEN_DOT}:/=~\"]|\n\r?(?=[{FILLER}.])| tod )*+", re.IGNORECASE
)
_CHAIN_REVERSED = re.compile(
    rf"(?:[{LETTER}{OTHER_LETTER}0-9._%+'\-{FILLER}{SPOKEN_AT}{SPOKEN_DOT}:/=~\"]"
    rf"|@(?:\n\r?)?|\n\r?(?=[{FILLER}@.])| (?:ta|tod) )*+",
    re.IGNORECASE,
)
"""Everything that an address may consist of, from its end to its beginning, and keys and IPv6 addresses too."""
_SIGN = re.compile(rf"@|{SPOKEN_AT}| at ", re.IGNORECASE)
_PARTIAL_SIGN = re.compile(
    r"[ \t\[({<%&\r\n](?:(?:(?<=[ \t])[\[({<]|(?<=[\[({<]))[ \t]?(?:a|at|@|d|do|dot|\.)?[ \t]?[\])}>]?[ \t]?"
    r"|(?<= )(?:a|at|d|do|dot)?|(?<=%)[24]?|(?<=&)[#a-z0-9]{0,11};?|(?<=\r)\n?|(?<=\n))\Z",
    re.IGNORECASE,
)
_OPEN_QUOTE = re.compile(rf"\"{_QUOTED}*(?: {_QUOTED}*){{0,2}}\"?\Z")


def open_email(recent: str) -> int:
    """Return how many characters at the end of a text may be an unfinished address, key or IPv6 address.

    Args: recent: the last `EMAIL_REACH` characters of the text, or more.
    """
    length = _open_local_part(recent)
    # What may become a sign, as "[a" may, keeps the address before it open.
    if partial := _PARTIAL_SIGN.search(recent, max(0, len(recent) - 16)):
        length = max(length, _open_local_part(recent[: partial.start()]) + len(partial[0]))
    return length


def _open_local_part(recent: str) -> int:
    """Return how many characters at the end of a text may be an address, or a local part in quotes."""
    length = _open_chain(recent)
    if '"' in recent and (quote := _OPEN_QUOTE.search(recent, max(0, len(recent) - _QUOTED_LOCAL_PART - 2))):
        length = max(length, len(recent) - quote.start())
    return length


def _has_sign(text: str) -> bool:
    """Return whether `_SIGN` is somewhere in a text."""
    return "@" in text or SPOKEN_AT in text or " at " in text.lower()


def _open_chain(recent: str) -> int:
    """Return how many characters at the end of a text may be an address, if its sign is complete."""
    if not _has_sign(recent):
        before = recent[: -LOCAL_PART - 1 : -1]
        # Of ASCII the second pattern takes nothing that the first does not.
        patterns = (_WORD_REVERSED,) if before.isascii() else (_WORD_REVERSED, _OTHER_REVERSED)
        return max(run.end() for pattern in patterns if (run := pattern.match(before)))
    before = recent
    chain = _CHAIN_REVERSED.match(before[::-1])
    size = chain.end() if chain else 0
    length = min(size, LOCAL_PART)
    # Only the last sign can be open: the domain after any other one ends at the next.
    *_, sign = (None, *_SIGN.finditer(before, len(before) - size))
    if sign is not None:
        end = len(before[: sign.start()].rstrip("\r\n"))
        local = _CHAIN_REVERSED.match(before[max(0, end - LOCAL_PART) : end][::-1])
        length = len(before) - end + (local.end() if local else 0)
        if before.endswith('"', 0, end):
            quote = before.rfind('"', max(0, end - _QUOTED_LOCAL_PART - 2), end - 1)
            length = max(length, len(before) - quote) if quote >= 0 else length
    return length
