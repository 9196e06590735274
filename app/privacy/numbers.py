"""Matches card, bank account, social security and phone numbers at a given position of a shadow text.

A regular expression finds candidates; a checksum, the structure in a registry or a numbering plan validates them.  The
two rules of `patterns.py`, the only caller, hold here: an end is rejected only because of a letter, a digit or "-5"
after it, and every possible end is tried.  Where a number may begin is decided by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import cache

import phonenumbers
from stdnum import iban, luhn, numdb
from stdnum.us import itin, ssn

Matcher = Callable[[str, int, str], int]
"""(shadow, start, left) -> end of the entity that begins at `start`, or -1; `left` is the context before it."""

_NOT_DIGITS = re.compile("[^0-9]")
_DECIMALS = re.compile(r"[0-9][.,\-]\Z")

_CARD_SHAPES = tuple(
    re.compile(shape.replace(" ", r"[ \t._\-]{0,2}") + "(?![0-9])")
    for shape in (
        r"[0-9]{13,19}",
        r"[0-9]{4} [0-9]{4} [0-9]{4} [0-9]{4} [0-9]{1,3}",
        r"[0-9]{4} [0-9]{4} [0-9]{4} [0-9]{4}",
        r"[0-9]{4} [0-9]{6} [0-9]{4,5}",
        r"[0-9]{4} [0-9]{3} [0-9]{3} [0-9]{3}",
    )
)
# First and last prefix of each range of issued numbers, with their lengths: Visa; Mastercard; American
# Express; Diners Club; JCB; Maestro, Discover, UnionPay and the domestic schemes of 50 and 56-69; Mir.
# Source: ISO/IEC 7812-1 and the ranges that the schemes publish.
_ISSUED = (
    ("4", "4", (13, 16, 19)),
    ("51", "55", (16,)),
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),
    ("37", "37", (15,)),
    ("300", "305", range(14, 20)),
    ("36", "36", range(14, 20)),
    ("38", "39", range(14, 20)),
    ("3528", "3589", range(16, 20)),
    ("50", "50", range(13, 20)),
    ("56", "69", range(13, 20)),
    ("2200", "2204", range(16, 20)),
)
_YEARS = re.compile(r"(?:(?:1[89]|2[01])[0-9]{2}){4}")


def card(shadow: str, start: int, left: str) -> int:
    if _DECIMALS.search(left):
        return -1
    ends = [-1]
    for shape in _CARD_SHAPES:
        candidate = shape.match(shadow, start)
        if candidate is None:
            continue
        digits = _NOT_DIGITS.sub("", candidate[0])
        # Four groups of four digits are rarely anything else; other numbers must be in an issued range.
        grouped = len(digits) == 16 < len(candidate[0]) and not _YEARS.fullmatch(digits)
        if (grouped or _is_issued(digits)) and digits.strip("0") and luhn.is_valid(digits):
            ends.append(candidate.end())
    return max(ends)


def _is_issued(digits: str) -> bool:
    return any(first <= digits[: len(first)] <= last and len(digits) in lengths for first, last, lengths in _ISSUED)


# ISO 13616's registry: two letters of the country, and the length of its numbers with their four first characters.
_IBAN_LENGTHS = {
    country: 4 + sum(map(int, re.findall(r"([0-9]+)!", properties["bban"])))
    for _, country, _, properties, _ in numdb.get("iban").prefixes
}
IBAN_REACH = 72
"""Longest IBAN written in groups, in characters."""
_IBAN_HEAD = re.compile(r"[A-Za-z]{2}[0-9]{2}")
_IBAN_REST = re.compile(r"(?:[ \t\-]?[A-Za-z0-9]){0,30}+")
_IBAN_REST_OPEN = re.compile(r"(?:[ \t\-]?[A-Za-z0-9]){0,30}+[ \t\-]?\Z")


def iban_number(shadow: str, start: int, left: str) -> int:
    length = _IBAN_LENGTHS.get(shadow[start : start + 2].upper())
    head = _IBAN_HEAD.match(shadow, start)
    rest = _IBAN_REST.match(shadow, start + 4)
    if length is None or head is None or rest is None:
        return -1
    places = [place for place in range(start, rest.end()) if shadow[place] not in " \t-"]
    if len(places) < length:
        return -1
    end = places[length - 1] + 1
    number = "".join(shadow[place] for place in places[:length])
    # Mod 97 and the country's structure suffice; the checks that some countries add are not applied.
    return end if iban.is_valid(number, check_country=False) else -1


def iban_open(shadow: str, begin: int) -> int:
    """Return the first position from `begin` on where later text could complete an IBAN; the length if there is none.

    `begin` is at most `IBAN_REACH` before the end.  Fewer characters than country and check digits belong to an
    unfinished word, which `patterns.first_open` covers.
    """
    for head in _IBAN_HEAD.finditer(shadow, begin):
        if head[0][:2].upper() in _IBAN_LENGTHS and _IBAN_REST_OPEN.match(shadow, head.end()):
            return head.start()
    return len(shadow)


_SSN = re.compile(r"[0-9]{3}([ \t.\-])[0-9]{2}\1[0-9]{4}(?![A-Za-z0-9])(?!-[0-9])")
# Sample numbers in print: never issued, so stdnum rejects them, but a text that contains one means an SSN.
_SAMPLE_SSN = re.compile(r"078051120|219099999|457555462|98765432[0-9]")


def social_security(shadow: str, start: int, left: str) -> int:
    candidate = _SSN.match(shadow, start)
    if candidate is None or (left[-1:] in set(".-/ \t") and left[-2:-1].isdigit()):
        return -1
    digits = _NOT_DIGITS.sub("", candidate[0])
    valid = _SAMPLE_SSN.fullmatch(digits) or ssn.is_valid(digits) or itin.is_valid(digits)
    return candidate.end() if valid else -1


_INTERNATIONAL = re.compile(r"(?:\+ ?|00(?=[1-9]))[0-9](?:[ \t()./\-]{0,3}[0-9]){6,14}")
_NORTH_AMERICAN = re.compile(
    r"(?:1[ \t./\-]{0,2})?(?:\([0-9]{3}\)|[0-9]{3}\)?)[ \t./\-]{0,2}[0-9]{3}[ \t.\-]{0,2}[0-9]{4}(?![0-9])"
)
_NATIONAL = re.compile(r"\(?[0-9]{1,6}\)?(?:[ \t./\-]{1,2}[0-9]{2,8}){1,5}|0[0-9]{7,12}")
_DATE = re.compile(r"[0-9]{4}[./ \-][0-9]{1,2}[./ \-][0-9]{1,2}|[0-9]{1,2}[./ \-][0-9]{1,2}[./ \-](?:[0-9]{2}){1,2}")
# The end of a longer number or of a price: what follows is not a national phone number.
_LONGER_NUMBER = re.compile(r"(?:[0-9][.,\-/]|[$\u20ac\u00a3\u00a5])\Z")
# 555, as area or exchange code, is reserved for fiction: invalid, but meant as a phone number.
_FICTION = re.compile(r"555[0-9]{7}|[2-9][0-9]{2}555[0-9]{4}")
# The largest signed 32-bit number and its neighbour, valid numbers in Dallas that software often prints.
_NOT_DIALLED = frozenset(("2147483647", "2147483648"))


def phone_matcher(regions: Collection[str]) -> Matcher:
    """Return a matcher of international numbers, and of national ones of `regions` (two capital letters, CLDR).

    Raises: ValueError: `phonenumbers` has no such region.
    """
    for region in regions:
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError(f"unknown phone region {region!r}")
    nationals = [
        _north_american if phonenumbers.country_code_for_region(region) == 1 else _national_matcher(region)
        for region in regions
    ]

    def phone(shadow: str, start: int, left: str) -> int:
        if left[-1:].isdigit():
            return -1
        international = _INTERNATIONAL.match(shadow, start)
        if international is not None:
            for end in _group_ends(shadow, start, international.end()):
                written = "+" + shadow[start:end].lstrip("+ 0")
                if _has_a_length_in_use(written) and _is_valid(written, None):
                    return end
        if _LONGER_NUMBER.search(left):
            return -1
        return max((national(shadow, start, left) for national in nationals), default=-1)

    return phone


def _group_ends(shadow: str, start: int, end: int) -> list[int]:
    """Return the positions in (start + 6, end] right after the last digit of a group, the last one first."""
    return [i for i in range(end, start + 6, -1) if shadow[i - 1].isdigit() and not shadow[i : i + 1].isdigit()]


def _has_a_length_in_use(written: str) -> bool:
    """Return whether the country's numbering plan has numbers of this length; cheaper than the full validation."""
    digits = _NOT_DIGITS.sub("", written)
    if len(digits) < 7:
        return False
    for size in (1, 2, 3):
        if lengths := _national_lengths(int(digits[:size])):
            national = digits[size:]
            # A trunk prefix of one or two digits may follow the country code, by mistake or in parentheses.
            trunk = (0, 1, 2) if "(" in written or national.startswith("0") else (0,)
            return any(len(national) - extra in lengths for extra in trunk)
    return False


@cache
def _national_lengths(country_code: int) -> frozenset[int]:
    """Return the lengths of national numbers of `country_code`; empty if no country has it."""
    regions = phonenumbers.COUNTRY_CODE_TO_REGION_CODE.get(country_code, ())
    each = (phonenumbers.PhoneMetadata.metadata_for_region_or_calling_code(country_code, region) for region in regions)
    return frozenset(
        length for plan in each if plan and plan.general_desc for length in plan.general_desc.possible_length
    )


def _is_valid(written: str, region: str | None) -> bool:
    try:
        number = phonenumbers.parse(written, region)
    except phonenumbers.NumberParseException:
        return False
    fictional = number.country_code == 1 and _FICTION.fullmatch(str(number.national_number)) is not None
    return fictional or phonenumbers.is_valid_number(number)


def _north_american(shadow: str, start: int, left: str) -> int:
    candidate = _NORTH_AMERICAN.match(shadow, start)
    if candidate is None:
        return -1
    written, end = candidate[0], candidate.end()
    if written.isdigit():
        # Ten digits without separators are often an identifier: apply stricter rules, and no fictional area codes.
        identifier = written in _NOT_DIALLED or written.removeprefix("1").startswith("555")
        following = shadow[end : end + 1]
        if identifier or (following.isascii() and following.isalpha()):
            return -1
    return end if _is_valid(written, "US") else -1


def _national_matcher(region: str) -> Matcher:
    metadata = phonenumbers.PhoneMetadata.metadata_for_region(region)
    trunk = (metadata.national_prefix if metadata else None) or ""

    def national(shadow: str, start: int, left: str) -> int:
        candidate = _NATIONAL.match(shadow, start)
        if candidate is None or not candidate[0].lstrip("(").startswith(trunk):
            return -1
        for end in _group_ends(shadow, start, candidate.end()):
            written = shadow[start:end]
            if not _DATE.fullmatch(written) and _is_valid(written, region):
                return end
        return -1

    return national
