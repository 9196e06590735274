"""Decide whether an entity begins at a given place of a shadow text, and where it ends.

Pure, and every answer reads a bounded piece of text: at most `LEFT_REACH` characters before the place, and the lengths
written in the patterns after it.  A pattern only proposes; a checksum, a numbering plan or an address parser accepts.
It does not know what happens between two entities, nor that text may arrive in pieces: `pii.py` knows.

Two rules hold for every kind, and `pii.py` rests on them.
* An end never depends on what another match could hide: the text after an end is only asked whether it goes on with a
  letter, a digit, ".5" or "-5", and where that is refused nothing else can begin (`_glued`).
* Where a shorter text would be accepted, a longer one does not take that away: all possible ends are tried.
"""

from __future__ import annotations

import ipaddress
import re
from enum import StrEnum

from app.privacy.numbers import (
    IBAN_REACH,
    Matcher,
    card,
    iban_account,
    iban_open,
    phone_matcher,
    social_security,
)

PATTERN_VERSION = 2
"""Raised with every change of what is found: caches of filtered text are keyed with it."""


class PiiKind(StrEnum):
    """What is looked for."""

    EMAIL = "email"
    PHONE = "phone"
    CARD = "card"
    IBAN = "iban"
    SSN = "ssn"
    IP = "ip"
    API_KEY = "api_key"


STRENGTH = (
    PiiKind.API_KEY,
    PiiKind.CARD,
    PiiKind.IBAN,
    PiiKind.SSN,
    PiiKind.EMAIL,
    PiiKind.IP,
    PiiKind.PHONE,
)
"""Of two kinds that claim the very same characters, the first of these wins."""

LEFT_REACH = 8
"""Characters before a place that the rules about its left side may read."""
NUMBER_REACH = 64
"""Characters that a phone, card, SSN or address can span, with the two that may be asked after its end."""
LOCAL_PART = 64
"""Longest local part of an e-mail address, RFC 5321, section 4.5.3.1.1."""
EMAIL_REACH = LOCAL_PART + 1 + 8 * 64 + 64
JWT_HEADER = 512
JWT_REACH = JWT_HEADER + 16

# Letters of addresses beside ASCII: Latin, Greek and Cyrillic.  Scripts written without spaces are left out, because
# there the words around an address would become part of it.
_LETTER = "A-Za-z\u00c0-\u024f\u0370-\u052f"
LOCAL_CHARACTER = rf"[{_LETTER}0-9._%+'\-]"
_SEPARATOR = r"[ \t()./_\-]"

# Places where anything but an e-mail address could begin: cheap, so that ordinary prose is passed over at once.
TRIGGER = re.compile(
    rf"(?<![A-Za-z0-9])(?:(?=[0-9](?:{_SEPARATOR}{{0,3}}[0-9]){{6}})|(?=[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}})"
    r"|(?=[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:])|(?=::[0-9A-Fa-f])|(?=[A-Za-z]{2}[0-9]{2}[ -]?[A-Za-z0-9])"
    r"|(?=sk[-_]|rk_|pk_|llm_|hf_|gh[a-z]_|github_|glpat|A[KS]IA|AIza|xox|eyJ))"
    r"|(?=\+ ?[0-9])|(?=\([0-9])"
)

# What a refused end of a number looks like from the place behind it; see `_glued`.
_REFUSED_END = re.compile(r"(?:\.[0-9]{1,3}\.|[ \t.\-][0-9]{4}-)\Z")


def _alphanumeric(character: str) -> bool:
    """Whether `character`, one or none, is an ASCII letter or digit."""
    return character.isascii() and character.isalnum()


def _glued(shadow: str, start: int, left: str) -> bool:
    """Whether `start` lies inside a longer word or number, where no entity may begin.

    This mirrors the ends that the matchers refuse.  Were it laxer, a number refused because of the text behind it
    would be accepted as soon as that text is itself replaced: the filter would find more in its own output.
    """
    if _alphanumeric(left[-1:]):
        return True
    return shadow[start] in "0123456789" and _REFUSED_END.search(left) is not None


_DOMAIN = re.compile(
    rf"(?:[{_LETTER}0-9](?:[{_LETTER}0-9\-]{{0,62}})\.){{1,8}}(?:[Xx][Nn]--[A-Za-z0-9\-]{{2,59}}|[{_LETTER}]{{2,63}})"
)
_LOCAL_START = re.compile(rf"[{_LETTER}0-9_]")
_LOCAL_REVERSED = re.compile(rf"{LOCAL_CHARACTER}{{0,{LOCAL_PART}}}+")


def email_around(shadow: str, at: int, floor: int, first: int) -> tuple[int, int] | None:
    """The e-mail address whose "@" is at `at`, as (start, end); it begins at `first` or later.

    Nothing before `floor` is read, and what lies between `floor` and `first` only as the left side of what follows.

    A local part over 64 characters is nobody's address, but its last 64 may be: it is taken from the first of them
    where a word, or the letters of a longer word, allow a start.
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
        # Inside a word only behind a letter that cannot be the end of a refused number or IPv6 address.
        if not _glued(shadow, start, left) or (left[-1:].isalpha() and ":" not in left[-5:]):
            return start, domain.end()
    return None


_API_KEY = re.compile(
    r"(?:sk-(?=[a-z_\-]{0,40}[A-Z0-9])[A-Za-z0-9_\-]{16}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10}"
    r"|llm_[A-Za-z0-9]{4,32}_[A-Za-z0-9_\-]{12}|hf_[A-Za-z0-9]{16}|gh[pousr]_[A-Za-z0-9]{16}"
    r"|github_pat_[A-Za-z0-9_]{16}|glpat-[A-Za-z0-9_\-]{16}|A[KS]IA[A-Z0-9]{16}|xox[a-z]-[A-Za-z0-9\-]{10}"
    r"|AIza[A-Za-z0-9_\-]{24})"
)
_JWT = re.compile(rf"eyJ[A-Za-z0-9_\-]{{14,{JWT_HEADER}}}+\.[A-Za-z0-9_\-]{{8}}")
KEY_REST = re.compile(r"[A-Za-z0-9_\-]*+")
"""How a key goes on, once it is known to be one; it has no longest length."""
JWT_REST = re.compile(r"(?:[A-Za-z0-9_\-]|\.(?=[A-Za-z0-9_\-]))*+")


def key_rest(shadow: str, start: int) -> re.Pattern[str]:
    """How the key at `start` goes on after its first characters."""
    return JWT_REST if shadow.startswith("eyJ", start) else KEY_REST


def _api_key(shadow: str, start: int, left: str) -> int:
    opening = _API_KEY.match(shadow, start) or _JWT.match(shadow, start)
    if opening is None:
        return -1
    rest = key_rest(shadow, start).match(shadow, opening.end())
    return rest.end() if rest else opening.end()


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
    """Whether `address` is an IPv6 address, and not a slice `[::2]`, a path `f64::add` or a fingerprint `43:51:...`."""
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
    # Two words around "::" are an address only if they begin like one that is in use: 2000::/3, fc00::/6, or embedded.
    if address.startswith("::"):
        return len(groups) == 2
    return len(groups) == 2 and len(groups[0]) == 4 and groups[0][0] in "23Ff" and any(c.isdigit() for c in address)


_WORD_REVERSED = re.compile(rf"(?:{LOCAL_CHARACTER}|[@:])*+")
_NUMBER_REVERSED = re.compile(r"[0-9+ \t()./_\-]*+")
_NUMBER_START = re.compile(r"[0-9+(]")
_JWT_OPEN = re.compile(rf"eyJ[A-Za-z0-9_\-]{{0,{JWT_HEADER}}}+(?:\.[A-Za-z0-9_\-]{{0,7}})?\Z")


def first_open(shadow: str, begin: int) -> int:
    """The first place from `begin` on where text still to come could make, change or prolong an entity.

    Whatever follows, everything before that place is decided.  For a matcher reads on only while it sees characters
    that its kind is made of: a place is open if nothing but such characters lies between it and the end, and if the
    kind can be that long.  Keys may be longer: what opens them is bounded, and the caller follows the rest.
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
    """Where an open e-mail address, IPv6 address or beginning of a key may begin, if `recent` ends at `size`."""
    if "@" not in recent:
        recent = recent[-LOCAL_PART:]
    run = _WORD_REVERSED.match(recent[::-1])
    length = run.end() if run else 0
    # Only the last "@" can be open: the domain behind any other has ended at the next one.
    at = recent.rfind("@", len(recent) - length)
    local = _LOCAL_REVERSED.match(recent[max(0, at - LOCAL_PART) : at][::-1]) if at >= 0 else None
    return size - max(min(length, LOCAL_PART), len(recent) - at + local.end() if local else 0)


def matchers(kinds: frozenset[PiiKind], phone_region: str) -> dict[PiiKind, Matcher]:
    """The matchers of `kinds`, strongest first; e-mail is not among them (`email_around`).

    Raises: ValueError: unknown `phone_region`.
    """
    every = {
        PiiKind.API_KEY: _api_key,
        PiiKind.CARD: card,
        PiiKind.IBAN: iban_account,
        PiiKind.SSN: social_security,
        PiiKind.IP: _ip,
        PiiKind.PHONE: phone_matcher(phone_region),
    }
    return {kind: _unglued(every[kind]) for kind in STRENGTH if kind in kinds and kind in every}


def _unglued(matcher: Matcher) -> Matcher:
    """`matcher`, asked only where an entity may begin."""

    def match(shadow: str, start: int, left: str) -> int:
        # A "+" or "(" begins a phone number even behind a letter: no end is refused because of one.
        if shadow[start] not in "+(" and _glued(shadow, start, left):
            return -1
        return matcher(shadow, start, left)

    return match
