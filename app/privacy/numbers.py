"""Matches card, bank account and social security numbers at a given position of a shadow text.

A regular expression finds candidates; a checksum or the structure in a registry validates them.  The two rules of
`patterns.py`, the only caller beside `phones.py`, hold here: an end is rejected only because of a letter, a digit or
"-5" after it, and every possible end is tried.  Where a number may begin is decided by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from stdnum import iban, numdb

Matcher = Callable[[str, int, str], int]
"""(shadow, start, left) -> end of the entity that begins at `start`, or -1; `left` is the context before it."""

_NOT_DIGITS = re.compile("[^0-9]+")
_DECIMALS = re.compile(r"[0-9][.,\-]\Z")
_DIGIT_BEFORE = re.compile(r"[0-9][ \t.,/|\-]{1,2}\Z")

# A group may be parted from the next by nothing, by some punctuation, or by the end of a line.
_PARTED = r"(?:[ \t._\-/,|]{0,3}|[.\-]?[ \t]?\r?\n[ \t]?)"
_CARD_SHAPES = tuple(
    re.compile(shape.replace(" ", _PARTED) + "(?![0-9])")
    for shape in (
        r"[0-9]{13,19}",
        r"[0-9]{4} [0-9]{4} [0-9]{4} [0-9]{4} [0-9]{1,3}",
        r"[0-9]{4} [0-9]{4} [0-9]{4} [0-9]{4}",
        r"[0-9]{4} [0-9]{6} [0-9]{4,5}",
        r"[0-9]{4} [0-9]{3} [0-9]{3} [0-9]{3}",
    )
)
_SPACED_DIGITS = re.compile(r"[0-9]([ \t.,/|\-]{1,2})[0-9](?:\1[0-9](?![0-9])){11,17}")
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
_LIST = frozenset(",/|")


def card(shadow: str, start: int, left: str) -> int:
    if _DECIMALS.search(left):
        return -1
    ends = [-1]
    for shape in _CARD_SHAPES:
        candidate = shape.match(shadow, start)
        if candidate is not None and _is_card(candidate[0]):
            ends.append(candidate.end())
    return max(*ends, _card_of_spaced_digits(shadow, start, left))


def _is_card(written: str) -> bool:
    digits = _NOT_DIGITS.sub("", written)
    if not digits.strip("0") or not _has_luhn_digit(digits) or written.count("\n") > 1:
        return False
    if len(digits) == len(written):
        # The numbers of products are as long, and some pass both checks.
        return _is_issued(digits) and not (len(digits) in (13, 14) and _has_gtin_digit(digits))
    groups = [int(digits[at : at + 4]) for at in range(0, 16, 4)]
    counting = len(digits) == 16 and sorted(groups) in (groups, groups[::-1]) and len(set(groups)) == 4
    if _is_issued(digits):
        return not (counting and _LIST & set(written))
    # Four groups of four digits are rarely anything else; other numbers must be in an issued range.
    return len(digits) == 16 and not counting


def _card_of_spaced_digits(shadow: str, start: int, left: str) -> int:
    candidate = _SPACED_DIGITS.match(shadow, start)
    if candidate is None or _DIGIT_BEFORE.search(left):
        return -1
    digits = _NOT_DIGITS.sub("", candidate[0])
    step = 1 + len(candidate[1])
    for count in range(len(digits), 12, -1):
        if _is_issued(digits[:count]) and _has_luhn_digit(digits[:count]):
            return start + (count - 1) * step + 1
    return -1


_DOUBLED = tuple(sum(divmod(2 * digit, 10)) for digit in range(10))


def _has_luhn_digit(digits: str) -> bool:
    """Source: ISO/IEC 7812-1, annex B."""
    total = sum(map(int, digits[-1::-2])) + sum(_DOUBLED[int(digit)] for digit in digits[-2::-2])
    return total % 10 == 0


def _has_gtin_digit(digits: str) -> bool:
    """Return whether the last digit is that of an EAN or GTIN.  Source: GS1 General Specifications, section 7.9."""
    return (sum(map(int, digits[-1::-2])) + 3 * sum(map(int, digits[-2::-2]))) % 10 == 0


def _is_issued(digits: str) -> bool:
    return any(first <= digits[: len(first)] <= last and len(digits) in lengths for first, last, lengths in _ISSUED)


# ISO 13616's registry: two letters of the country, and the length of its numbers with their four first characters.
_IBAN_LENGTHS = {
    country: 4 + sum(map(int, re.findall(r"([0-9]+)!", properties["bban"])))
    for _, country, _, properties, _ in numdb.get("iban").prefixes
}
IBAN_REACH = 106
"""Longest IBAN written in groups, in characters."""
_IBAN_HEAD = re.compile(r"[A-Za-z]{2}[0-9]{2}")
_IBAN_REST = re.compile(r"(?:(?:[ \t\-]|\r?\n)?[A-Za-z0-9]){0,30}+")
_IBAN_REST_OPEN = re.compile(r"(?:(?:[ \t\-]|\r?\n)?[A-Za-z0-9]){0,30}+(?:[ \t\-]|\r?\n?)?\Z")


def iban_number(shadow: str, start: int, left: str) -> int:
    length = _IBAN_LENGTHS.get(shadow[start : start + 2].upper())
    head = _IBAN_HEAD.match(shadow, start)
    rest = _IBAN_REST.match(shadow, start + 4)
    if length is None or head is None or rest is None:
        return -1
    places = [place for place in range(start, rest.end()) if shadow[place] not in " \t-\r\n"]
    if len(places) < length:
        return -1
    end = places[length - 1] + 1
    if shadow.count("\n", start, end) > 1:
        return -1
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


_SSN = re.compile(r"[0-9]{3}([ \t.\-])(?:\r?\n)?[0-9]{2}\1(?:\r?\n)?[0-9]{4}(?![A-Za-z0-9])(?!-[0-9])")
_COMPACT_SSN = re.compile(r"[0-9]{9}(?![A-Za-z0-9])(?!-[0-9])")
_SSN_NAMED = re.compile(
    r"(?:ssn|itin|tin|social security(?: number| no\.?)?|taxpayer(?: id)?)(?: is)?[ \t:=#]{0,3}\Z", re.IGNORECASE
)
# Sample numbers in print: never issued, so the rules reject them, but a text that contains one means an SSN.
_SAMPLE_SSN = re.compile(r"078051120|219099999|457555462|98765432[0-9]")
# Source: Social Security Administration, randomization of 2011; of an ITIN, IRS publication 1915.
_ISSUED_SSN = re.compile(r"(?!000|666|9)[0-9]{3}(?!00)[0-9]{2}(?!0000)[0-9]{4}")
_ISSUED_ITIN = re.compile(r"9[0-9]{2}(?:5[0-9]|6[0-5]|7[0-9]|8[0-8]|9[0-24-9])[0-9]{4}")


def social_security(shadow: str, start: int, left: str) -> int:
    candidate = _SSN.match(shadow, start)
    if candidate is None:
        compact = _COMPACT_SSN.match(shadow, start)
        return compact.end() if compact and _SSN_NAMED.search(left) else -1
    if candidate[0].count("\n") > 1:
        return -1
    # Part of a longer number; in a table only where a space parts everything.
    if left[-2:-1].isdigit() and (left[-1] in ".-/" or left[-1] == candidate[1]):
        return -1
    digits = _NOT_DIGITS.sub("", candidate[0])
    valid = _ISSUED_SSN.fullmatch(digits) or _ISSUED_ITIN.fullmatch(digits) or _SAMPLE_SSN.fullmatch(digits)
    return candidate.end() if valid else -1
