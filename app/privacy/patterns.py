"""Matches each kind of entity at a given position of a shadow text.

Pure, and every match reads a bounded part of the text: at most `LEFT_REACH` characters before the position, and the
lengths in the patterns after it.  A pattern finds candidates; a checksum, a numbering plan or an address parser
validates them.  `redactor.py` scans texts and streams with these matchers.

Two rules hold for every kind, and `redactor.py` relies on them.
* An end never depends on text that another match could replace: an end is rejected only if a letter, a digit, ".5" or
  "-5" follows, and where it is rejected nothing else can begin (`inside_word`).
* Where a shorter candidate is valid, a longer one does not change that: all possible ends are tried.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

from app.privacy.numbers import (
    IBAN_REACH,
    Matcher,
    card,
    iban_number,
    iban_open,
    social_security,
)
from app.privacy.phones import phone_matcher

PATTERN_VERSION = 3
"""Incremented with every change of what is found: caches of filtered text have it in their key."""


class PiiKind(StrEnum):
    """Kinds of personal data that can be detected."""

    EMAIL = "email"
    PHONE = "phone"
    CARD = "card"
    IBAN = "iban"
    SSN = "ssn"
    IP = "ip"
    API_KEY = "api_key"


PHONE_REGIONS = (
    *("US", "GB", "IE", "DE", "AT", "CH", "FR", "BE", "NL", "ES", "PT", "IT", "SE", "PL", "UA", "RU", "TR", "IL"),
    *("SA", "AE", "EG", "ZA", "IN", "PK", "ID", "CN", "JP", "KR", "AU", "BR", "MX", "AR"),
)
"""Regions whose national phone numbers are detected by default."""

PRECEDENCE = (
    PiiKind.API_KEY,
    PiiKind.CARD,
    PiiKind.IBAN,
    PiiKind.SSN,
    PiiKind.EMAIL,
    PiiKind.IP,
    PiiKind.PHONE,
)
"""Precedence of kinds that match the same span, the first one wins."""

LEFT_REACH = 40
"""Characters before a position that the rules for the left context may read."""
NUMBER_REACH = 128
"""Longest phone number, card number, SSN or IP address, with the two characters of lookahead after its end."""
LOCAL_PART = 64
"""Longest local part of an e-mail address, RFC 5321, section 4.5.3.1.1."""
EMAIL_REACH = LOCAL_PART + 1 + 8 * 64 + 64
JWT_HEADER = 512
JWT_REACH = JWT_HEADER + 16

# Letters of e-mail addresses beside ASCII: Latin, Greek and Cyrillic.  Scripts written without spaces are excluded,
# because the words around an address would become part of it.
_LETTER = "A-Za-z\u00c0-\u024f\u0370-\u052f"
LOCAL_CHARACTER = rf"[{_LETTER}0-9._%+'\-]"
_SEPARATOR = r"[ \t\r\n()./,|_\-]"

# Positions where an entity other than an e-mail address could begin; a cheap test that skips ordinary prose.
TRIGGER = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?=[0-9](?:{_SEPARATOR}{{0,3}}[0-9]){{6}})|(?=[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}})"
    r"|(?=[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:])|(?=::[0-9A-Fa-f])|(?=[A-Za-z]{2}[0-9]{2}[ -]?[A-Za-z0-9])"
    r"|(?=sk[-_]|rk_|pk_|llm_|hf_|gh[a-z]_|github_|glpat|A[KS]IA|AIza|xox|eyJ))"
    r"|(?=\+ ?[0-9])|(?=\([0-9])"
)

# The left context of a position right after a rejected end of a number; see `inside_word`.
_REJECTED_END = re.compile(r"(?:\.[0-9]{1,3}\.|[ \t.\-][0-9]{4}-)\Z")


def _alphanumeric(character: str) -> bool:
    """Return whether `character`, which may be empty, is an ASCII letter or digit."""
    return character.isascii() and character.isalnum()


def inside_word(shadow: str, start: int, left: str) -> bool:
    """Return whether `start` lies inside a longer word or number, where no entity may begin.

    Mirrors the ends that the matchers reject.  If it were laxer, a number rejected because of the text after it would
    be accepted once that text is replaced: redacting the redacted text would find more.
    """
    if _alphanumeric(left[-1:]):
        return True
    return shadow[start] in "0123456789" and _REJECTED_END.search(left) is not None


_DOMAIN = re.compile(
    rf"(?:[{_LETTER}0-9](?:[{_LETTER}0-9\-]{{0,62}})\.){{1,8}}(?:[Xx][Nn]--[A-Za-z0-9\-]{{2,59}}|[{_LETTER}]{{2,63}})"
)
_LOCAL_START = re.compile(rf"[{_LETTER}0-9_]")
_LOCAL_REVERSED = re.compile(rf"{LOCAL_CHARACTER}{{0,{LOCAL_PART}}}+")


def email_around(shadow: str, at: int, floor: int, first: int) -> tuple[int, int] | None:
    """Return the (start, end) of the e-mail address whose "@" is at `at`; it begins at `first` or later.

    Nothing before `floor` is read; the text between `floor` and `first` is only left context.

    A local part of more than 64 characters is not an address, but its last 64 may be: the address begins at the first
    of them where a word, or the letters of a longer word, may begin.
    """
    lowest = max(floor, at - LOCAL_PART)
    run = _LOCAL_REVERSED.match(shadow[lowest:at][::-1])
    if run is None or not run.end():
        return None
    domain = _DOMAIN.match(shadow, at + 1)
    if domain is None:
        return None
    for start in range(max(at - run.end(), first), at):
        left = shadow[max(floor, start - LEFT_REACH) : start]
        if not _LOCAL_START.match(shadow, start):
            continue
        # Inside a word only after a letter that cannot be the end of a rejected number or IPv6 address.
        if not inside_word(shadow, start, left) or (left[-1:].isalpha() and ":" not in left[-5:]):
            return start, domain.end()
    return None


_API_KEY = re.compile(
    r"(?:sk-(?=[a-z_\-]{0,40}[A-Z0-9])[A-Za-z0-9_\-]{16}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10}"
    r"|llm_[A-Za-z0-9]{4,32}_[A-Za-z0-9_\-]{12}|hf_[A-Za-z0-9]{16}|gh[pousr]_[A-Za-z0-9]{16}"
    r"|github_pat_[A-Za-z0-9_]{16}|glpat-[A-Za-z0-9_\-]{16}|A[KS]IA[A-Z0-9]{16}|xox[a-z]-[A-Za-z0-9\-]{10}"
    r"|AIza[A-Za-z0-9_\-]{24})"
)
_JWT = re.compile(rf"eyJ[A-Za-z0-9_\-]{{14,{JWT_HEADER}}}+\.[A-Za-z0-9_\-]{{8}}")
_KEY_RESTS = {
    "key": re.compile(r"[A-Za-z0-9_\-]*+"),
    "token": re.compile(r"(?:[A-Za-z0-9_\-]|\.(?=[A-Za-z0-9_\-]))*+"),
}
"""The rest of a key after its recognised prefix, by rule; of any length."""


class KeyRest(NamedTuple):
    """Where the rest of a key ends in a text."""

    end: int
    open: bool
    """Whether text that follows could continue it."""


def key_rule(shadow: str, start: int) -> str:
    """Return the rule by which the key at `start` continues after its recognised prefix."""
    return "token" if shadow.startswith("eyJ", start) else "key"


def key_rest(rule: str, shadow: str, start: int) -> KeyRest:
    """Return the rest of a key whose recognised beginning, or an earlier part of the rest, ends at `start`."""
    found = _KEY_RESTS[rule].match(shadow, start)
    end = found.end() if found else start
    return KeyRest(end, shadow[end:] in ("", "."))


def _api_key(shadow: str, start: int, left: str) -> int:
    prefix = _API_KEY.match(shadow, start) or _JWT.match(shadow, start)
    return -1 if prefix is None else key_rest(key_rule(shadow, start), shadow, prefix.end()).end


_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9])(?!\.[0-9])")
_IPV6 = re.compile(r"[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}")


def _ip(shadow: str, start: int, left: str) -> int:
    four = _IPV4.match(shadow, start)
    if four is not None and not (left[-1:] == "." and left[-2:-1].isdigit()):
        try:
            ipaddress.IPv4Address(four[0])
            return four.end()
        except ValueError:
            return -1
    if left.endswith(":") or ":" not in shadow[start : start + 5]:
        return -1
    six = _IPV6.match(shadow, start)
    if six is None:
        return -1
    for end in range(six.end(), start + 2, -1):
        address = shadow[start:end]
        if (address.endswith("::") or not _alphanumeric(shadow[end : end + 1])) and _is_ipv6(address, left):
            return end
    return -1


def _is_ipv6(address: str, left: str) -> bool:
    """Return whether `address` is IPv6, and not a slice `[::2]`, a path `f64::add` or a fingerprint `43:51:...`."""
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    if address == "::1":
        return left[-1:] != "[" or left[-2:-1] == "/"
    groups = [group for group in address.split(":") if group]
    if not any(len(group) > 2 for group in groups):
        return False
    if "::" not in address or len(groups) > 2:
        return True
    # Two groups around "::" are an address only with a prefix that is in use (2000::/3, fc00::/6) or embedded IPv4.
    if address.startswith("::"):
        return len(groups) == 2
    return len(groups) == 2 and len(groups[0]) == 4 and groups[0][0] in "23Ff" and any(c.isdigit() for c in address)


_WORD_REVERSED = re.compile(rf"(?:{LOCAL_CHARACTER}|[@:])*+")
_NUMBER_REVERSED = re.compile(r"[0-9+ \t\r\n()./,|_\-]*+")
_NUMBER_START = re.compile(r"[0-9+(]")
_JWT_OPEN = re.compile(rf"eyJ[A-Za-z0-9_\-]{{0,{JWT_HEADER}}}+(?:\.[A-Za-z0-9_\-]{{0,7}})?\Z")


def first_open(shadow: str, begin: int) -> int:
    """Return the first position from `begin` on where later text could create, change or extend an entity.

    Everything before it is decided, whatever follows: a matcher continues only while it reads characters of its kind,
    so a position is open if only such characters lie between it and the end, and the kind can be that long.  Keys may
    be longer: their prefix is bounded, and the caller consumes the rest (`key_rest`).
    """
    size = len(shadow)
    recent = shadow[max(begin, size - EMAIL_REACH) :]
    firsts = [size, _open_word(recent, size), iban_open(shadow, max(begin, size - IBAN_REACH))]
    number = _NUMBER_REVERSED.match(recent[: -NUMBER_REACH - 1 : -1])
    if number and (start := _NUMBER_START.search(shadow, size - number.end())):
        firsts.append(start.start())
    if "eyJ" in recent and (token := _JWT_OPEN.search(shadow, max(begin, size - JWT_REACH))):
        firsts.append(token.start())
    return min(first for first in firsts if first >= begin)


def _open_word(recent: str, size: int) -> int:
    """Return where an open e-mail address, IPv6 address or key prefix may begin, if `recent` ends at `size`."""
    if "@" not in recent:
        recent = recent[-LOCAL_PART:]
    run = _WORD_REVERSED.match(recent[::-1])
    length = run.end() if run else 0
    # Only the last "@" can be open: the domain after any other one ends at the next.
    at = recent.rfind("@", len(recent) - length)
    local = _LOCAL_REVERSED.match(recent[max(0, at - LOCAL_PART) : at][::-1]) if at >= 0 else None
    return size - max(min(length, LOCAL_PART), len(recent) - at + local.end() if local else 0)


_DIGITS_SHOWN = 4
"""A number of so many digits, such as a year, says too little of a card, phone or account number to be left out; in
groups, such as a decimal or the numbers of a list, it is one less."""
_HARMLESS_TAIL = re.compile(
    rf"[^\w@]*+(?:[0-9]{{0,{_DIGITS_SHOWN}}}|[0-9](?:[^\w@]*[0-9]){{1,{_DIGITS_SHOWN - 2}}}"
    r"|[^\W\d_]++(?:(?:['\u2019\-]|[^\w@]+)[^\W\d_]++)*+)[^\w@]*+"
)
_WRITTEN_OUT = re.compile(r"(?<![^\W_])(?:at|dot)(?![^\W_])|[^\W\d][.+%]\w|\w[.+%][^\W\d]", re.IGNORECASE)
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


_STARTS: dict[PiiKind, str] = {
    PiiKind.API_KEY: "letter",
    PiiKind.CARD: "digit",
    PiiKind.IBAN: "letter",
    PiiKind.SSN: "digit",
    PiiKind.IP: "letter digit colon",
    PiiKind.PHONE: "digit sign",
}
"""What an entity of each kind may begin with; an e-mail address is found by its "@" (`email_around`)."""


class Matchers:
    """The matchers of some kinds, by the character that an entity begins with."""

    def __init__(self, kinds: frozenset[PiiKind], phone_regions: Collection[str]) -> None:
        """Raises: ValueError: an unknown phone region."""
        every = {
            PiiKind.API_KEY: _api_key,
            PiiKind.CARD: card,
            PiiKind.IBAN: iban_number,
            PiiKind.SSN: social_security,
            PiiKind.IP: _ip,
            PiiKind.PHONE: phone_matcher(phone_regions),
        }

        def of(start: str) -> tuple[tuple[PiiKind, Matcher], ...]:
            found = (kind for kind in PRECEDENCE if kind in kinds and start in _STARTS.get(kind, "").split())
            return tuple((kind, every[kind]) for kind in found)

        self._digit, self._sign, self._colon, self._letter = map(of, ("digit", "sign", "colon", "letter"))

    def ends(self, shadow: str, start: int, left: str) -> list[tuple[int, PiiKind]]:
        """Return the end of each kind's entity at `start`, in order of precedence."""
        character = shadow[start]
        # A "+" or "(" begins a phone number even after a letter: no end is rejected because of one.
        if character in "+(":
            matchers = self._sign
        elif inside_word(shadow, start, left):
            return []
        elif character in "0123456789":
            matchers = self._digit
        else:
            matchers = self._colon if character == ":" else self._letter
        return [(end, kind) for kind, matcher in matchers if (end := matcher(shadow, start, left)) >= 0]
