"""Matches each kind of entity at a given position of a shadow text.

Pure, and every match reads a bounded part of the text: at most `LEFT_REACH` characters before the position, and the
lengths in the patterns after it.  A pattern finds candidates; a checksum, a numbering plan or an address parser
validates them.  `redactor.py` scans texts and streams with these matchers.

Two rules hold for every kind, and `redactor.py` relies on them.
* An end never depends on text that another match could replace: an end is rejected only if a letter, a digit, ".5",
  "-5" or another number of a row follows, and where it is rejected nothing else can begin (`inside_word`, `phones.py`).
* Where a shorter candidate is valid, a longer one does not change that: all possible ends are tried.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from enum import StrEnum

from app.privacy.credentials import JWT_OPEN, JWT_REACH, PEM_OPEN, PEM_REACH, api_key
from app.privacy.emails import EMAIL_REACH, inside_word, open_email
from app.privacy.numbers import IBAN_REACH, Matcher, card, iban_number, iban_open, social_security
from app.privacy.phones import phone_matcher

PATTERN_VERSION = 6
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
_SEPARATOR = r"[ \t\r\n()./_\-]"
_CARD_SEPARATOR = r"[ \t\r\n./,|_\-]"

_TRIGGER = (
    rf"(?<![A-Za-z0-9])(?:(?=[0-9](?:{_SEPARATOR}{{0,3}}[0-9]){{6}}|[0-9](?:{_CARD_SEPARATOR}{{0,3}}[0-9]){{12}})|(?=[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}})"
    r"|(?=[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:])|(?=::[0-9A-Fa-f])|(?=[A-Za-z]{2}[0-9]{2}[ -]?[A-Za-z0-9])"
    r"|(?=sk[-_]|rk_|pk_|llm_|hf_|gh[a-z]_|github_|glpat|A[KS]IA|AIza|xox|eyJ|-----BEGIN )%s)"
    r"|(?=\+ ?[0-9])|(?=\([0-9])"
)
_ANY = re.compile(_TRIGGER % "")
_ANY_OR_TOKEN = re.compile(_TRIGGER % r"|(?<=(?i:earer ))|(?<=(?i:basic |token ))")


def trigger_of(shadow: str) -> re.Pattern[str]:
    """Return the pattern of positions where an entity other than an e-mail address could begin.

    A cheap test that skips ordinary prose.
    """
    return _ANY_OR_TOKEN if "uthorization" in shadow or "UTHORIZATION" in shadow else _ANY


_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![A-Za-z0-9])(?!\.[0-9])")
_WORD_CHARACTER = re.compile("[A-Za-z0-9]")
_IPV6 = re.compile(r"[0-9A-Fa-f:]{2,39}(?:\.[0-9]{1,3}){0,3}")


# A number with as many parts as an address.
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|section|sec|chapter|release|clause|article|appendix|step|rule|paragraph|build|firmware|oid"
    r"|abschnitt|kapitel|capítulo|chapitre|раздел|версия)|\u00a7|\u7b2c|\u7248\u672c)\.?[ :=]{0,2}\Z|\n#{0,6} ?\Z",
    re.IGNORECASE,
)
_ONE_DIGIT_EACH = re.compile(r"[0-9](?:\.[0-9]){3}")


def _ip(shadow: str, start: int, left: str) -> int:
    four = _IPV4.match(shadow, start)
    if four is not None and not (left[-1:] == "." and left[-2:-1].isdigit()):
        return four.end() if _is_ipv4(four[0], left) else -1
    if left.endswith(":") or ":" not in shadow[start : start + 5]:
        return -1
    six = _IPV6.match(shadow, start)
    if six is None:
        return -1
    for end in range(six.end(), start + 2, -1):
        address = shadow[start:end]
        if (address.endswith("::") or not _WORD_CHARACTER.match(shadow, end)) and _is_ipv6(address, left):
            return end
    return -1


def _is_ipv4(written: str, left: str) -> bool:
    """Return whether it is the address of a machine, and not of this one, none or a network, nor a version."""
    try:
        address = ipaddress.IPv4Address(written)
    except ValueError:
        return False
    inverted = int(address) ^ 0xFFFFFFFF
    is_mask = written.startswith("255.") and inverted & (inverted + 1) == 0
    if address.is_loopback or written.startswith("0.") or is_mask:
        return False
    version = _VERSION.search(left)
    # A heading begins its line, and has small numbers.
    return version is None or (version[0][0] == "\n" and not _ONE_DIGIT_EACH.fullmatch(written))


def _is_ipv6(address: str, left: str) -> bool:
    """Return whether `address` is IPv6, and not a slice `[::2]`, a path `f64::add` or a fingerprint `43:51:...`."""
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    groups = [group for group in address.split(":") if group]
    if not any(len(group) > 2 for group in groups):
        return False
    if "::" not in address or len(groups) > 2:
        return True
    # Two groups around "::" are an address only with a prefix that is in use (2000::/3, fc00::/6) or embedded IPv4.
    if address.startswith("::"):
        return len(groups) == 2
    return len(groups) == 2 and len(groups[0]) == 4 and groups[0][0] in "23Ff" and any(c.isdigit() for c in address)


_NUMBER_REVERSED = re.compile(r"[0-9+ \t\r\n()./,|_\-]*+")
_NUMBER_START = re.compile(r"[0-9+(]")


def first_open(shadow: str, begin: int) -> int:
    """Return the first position from `begin` on where later text could create, change or extend an entity.

    Everything before it is decided, whatever follows: a matcher continues only while it reads characters of its kind,
    so a position is open if only such characters lie between it and the end, and the kind can be that long.  Keys may
    be longer: their prefix is bounded, and the caller consumes the rest (`key_rest`).
    """
    size = len(shadow)
    recent = shadow[max(begin, size - EMAIL_REACH) :]
    first = size - open_email(recent)
    if _NUMBER_START.search(shadow, max(begin, size - NUMBER_REACH)):
        first = min(first, iban_open(shadow, max(begin, size - IBAN_REACH)))
        number = _NUMBER_REVERSED.match(recent[: -NUMBER_REACH - 1 : -1])
        if number and (start := _NUMBER_START.search(shadow, size - number.end())):
            first = min(first, start.start())
    if "eyJ" in recent and (token := JWT_OPEN.search(shadow, max(begin, size - JWT_REACH))):
        first = min(first, token.start())
    if "-" in recent[-PEM_REACH:] and (key := PEM_OPEN.search(shadow, max(begin, size - PEM_REACH))):
        first = min(first, key.start())
    return first


_STARTS: dict[PiiKind, str] = {
    PiiKind.API_KEY: "letter digit dash",
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
            PiiKind.API_KEY: api_key,
            PiiKind.CARD: card,
            PiiKind.IBAN: iban_number,
            PiiKind.SSN: social_security,
            PiiKind.IP: _ip,
            PiiKind.PHONE: phone_matcher(phone_regions),
        }

        def of(start: str) -> tuple[tuple[PiiKind, Matcher], ...]:
            found = (kind for kind in PRECEDENCE if kind in kinds and start in _STARTS.get(kind, "").split())
            return tuple((kind, every[kind]) for kind in found)

        self._digit, self._sign, self._letter = of("digit"), of("sign"), of("letter")
        self._others = {":": of("colon"), "-": of("dash")}

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
            matchers = self._others.get(character, self._letter)
        return [(end, kind) for kind, matcher in matchers if (end := matcher(shadow, start, left)) >= 0]
