"""Matches phone numbers, international ones and those of chosen regions as these print them.

A valid number alone is no evidence, as digits of most lengths are valid somewhere (`phone_plans.py`): a national number
is taken if it is written with its trunk prefix, with an area code in parentheses, in groups that its region prints, or
behind a word such as "phone"; and never behind one such as "order".
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

import phonenumbers

from app.privacy.number_context import announces_other, announces_phone
from app.privacy.numbers import Matcher, card, social_security
from app.privacy.phone_plans import (
    NORTH_AMERICA,
    behind_trunk,
    country_plan,
    north_american_plan,
    printed_groups,
    region_plan,
    trunk_prefix,
)

_NEWLINE = r"[.\-]?[ \t]?\r?\n[ \t]?"
_INTERNATIONAL = re.compile(rf"(?:\+ ?|00(?=[1-9]))[0-9](?:(?:[ \t()./\-]{{0,3}}|{_NEWLINE})[0-9]){{6,14}}")
_NATIONAL = re.compile(
    r"(\()?[0-9]{1,13}+(?(1)[ \t]?\)[ \t./\-]{0,3}[0-9]{1,9}+)"
    rf"(?:(?:\)[ \t./\-]{{0,2}}|[ \t./\-]{{0,3}}\(|[ \t./\-]{{1,3}}|{_NEWLINE})[0-9]{{1,9}}+){{0,5}}"
)
_GROUP = re.compile("[0-9]+")
_NOT_DIGITS = re.compile("[^0-9]+")
_DATE = re.compile(
    r"(?:(?:1[89]|20)[0-9]{2}([./ \-])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12][0-9]|3[01])"
    r"|(?:0?[1-9]|[12][0-9]|3[01])([./ \-])(?:0?[1-9]|[12][0-9]|3[01])\2"
    r"(?:(?:1[89]|20)[0-9]{2}|[0-9]{2}(?!\2)))(?![0-9])"
)
_DATE_AND_HOUR = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{2,4}")
_YEAR_IN_PARENTHESES = re.compile(r"\((?:1[5-9]|20)[0-9]{2}\)")
# The end of a longer number or of a price: what follows is not a national phone number.
_LONGER_NUMBER = re.compile(r"(?:[0-9][.,\-/]|[$\u20ac\u00a3\u00a5\u20b9][ \t]?)\Z")
_ONE_OF_A_ROW = re.compile("[0-9]{1,13}+ |[0-9]{9,13}+(?![0-9])")
_COMPACT = re.compile("[0-9]{7}")
_ROW_AFTER = re.compile(r" [0-9]{1,8}(?=[ ,;)!?\n]|\.(?:[ \n]|\Z)|\Z)")
# What makes a number without separators the name of a file, or an amount.
_SUFFIX = re.compile(
    r"\.(?:[0-9]{1,2}(?![0-9])|(?:jpe?g|png|gif|svg|pdf|txt|csv|json|xml|zip|gz|docx?|xlsx?|mp[34]|log|html?|md)(?![A-Za-z0-9]))",
    re.IGNORECASE,
)
_PART_OF_A_NAME = frozenset("-_/#=&%@.\\")
# The largest signed 32-bit number and its neighbour, valid numbers in Dallas that software often prints.
_NOT_DIALLED = frozenset(("2147483647", "2147483648"))
_COUNTING = "01234567890123456789"
_NORTH_AMERICAN = re.compile(
    rf"(?:1(?:[ \t./\-]{{0,2}}))?(?:\([0-9]{{3}}\)|[0-9]{{3}}\)?)(?:[ \t./\-]{{0,2}}|{_NEWLINE})[0-9]{{3}}"
    rf"(?:[ \t.\-]{{0,2}}|{_NEWLINE})[0-9]{{4}}(?![0-9])"
)


def phone_matcher(regions: Collection[str]) -> Matcher:
    """Return a matcher of international numbers, and of national ones of `regions` (two capital letters, CLDR).

    Raises: ValueError: `phonenumbers` has no such region.
    """
    plans = NationalPlans(tuple(sorted(set(regions))))

    def phone(shadow: str, start: int, left: str) -> int:
        if left[-1:].isdigit():
            return -1
        international = _international(shadow, start, left)
        if international >= 0:
            return international
        if left[-1:] == " " and left[-2:-1].isdigit() and _ONE_OF_A_ROW.match(shadow, start):
            # One of a row of numbers.
            return -1
        if _LONGER_NUMBER.search(left) and (left[-1] != "," or _COMPACT.match(shadow, start)):
            return -1
        return plans.match(shadow, start, left)

    return phone


def _international(shadow: str, start: int, left: str) -> int:
    candidate = _INTERNATIONAL.match(shadow, start)
    if candidate is None or (shadow[start] == "0" and left[-1:] == " " and left[-2:-1].isdigit()):
        return -1
    for end in range(candidate.end(), start + 6, -1):
        if shadow[end - 1].isdigit() and not shadow[end : end + 1].isdigit():
            digits = _NOT_DIGITS.sub("", shadow[start:end]).lstrip("0")
            if _of_acountry_plan(digits) and shadow.count("\n", start, end) <= 1:
                return end
    return -1


def _of_acountry_plan(digits: str) -> bool:
    for size in (1, 2, 3):
        if plan := country_plan(int(digits[:size] or 0)):
            return plan(digits[size:]) is not None
    return False


@cache
class NationalPlans:
    """The national numbers of some regions."""

    def __init__(self, regions: tuple[str, ...]) -> None:
        """Raises: ValueError: `phonenumbers` has no such region."""
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise ValueError(f"unknown phone region {region!r}")
        american = [region for region in regions if phonenumbers.country_code_for_region(region) == NORTH_AMERICA]
        self._north_american = north_american_plan() if american else None
        self._printed: dict[str, list[re.Pattern[str]]] = {}
        others = [region for region in regions if region not in american]
        self._any = re.compile("|".join(region_plan(region) for region in others)) if others else None
        by_trunk: dict[str, list[str]] = {}
        for region in others:
            trunk = trunk_prefix(region)
            by_trunk.setdefault(trunk or "0", []).extend(behind_trunk(region, trunk))
            for groups, digits in printed_groups(region, trunk):
                self._printed.setdefault(groups, []).append(digits)
        self._trunks = {trunk: re.compile("|".join(patterns)) for trunk, patterns in by_trunk.items()}

    def match(self, shadow: str, start: int, left: str) -> int:
        """Return the end of the national number that begins at `start`, or -1; `left` is the text before it."""
        end = self._match_north_american(shadow, start, left) if self._north_american else -1
        return self._match_others(shadow, start, left) if end < 0 and self._any else end

    def _match_north_american(self, shadow: str, start: int, left: str) -> int:
        candidate = _NORTH_AMERICAN.match(shadow, start)
        if candidate is None or self._north_american is None:
            return -1
        written, end = candidate[0], candidate.end()
        if not self._north_american(_NOT_DIGITS.sub("", written)) or _broken_twice(written):
            return -1
        if announces_phone(left):
            return end
        if announces_other(left):
            return -1
        if written.isdigit():
            # Ten digits without separators are often an identifier: apply stricter rules, and no fictional area codes.
            identifier = (
                written in _NOT_DIALLED or _SUFFIX.match(shadow, end) or written.removeprefix("1").startswith("555")
            )
            following = shadow[end : end + 1]
            if identifier or (following.isascii() and following.isalpha()) or left[-1:] in _PART_OF_A_NAME:
                return -1
            return -1 if _DATE_AND_HOUR.fullmatch(written) or _is_sequence(written) else end
        spaces = not set(written) & set("()./-")
        return -1 if spaces and _in_a_row(shadow, end) else end

    def _match_others(self, shadow: str, start: int, left: str) -> int:
        candidate = _NATIONAL.match(shadow, start)
        if candidate is None:
            return -1
        written = candidate[0]
        groups, ends = list[str](), list[int]()
        for group in _GROUP.finditer(written):
            groups.append(group[0])
            ends.append(group.end())
        digits = "".join(groups)
        if len(digits) < 7:
            return -1
        announced = bool(announces_phone(left))
        if not announced and _DATE.match(written):
            return -1
        for count in range(len(groups), 0, -1):
            if self._is_number(written[: ends[count - 1]], groups[:count], shadow, start, left, announced):
                return start + ends[count - 1]
        return -1

    def _is_number(self, written: str, groups: list[str], shadow: str, start: int, left: str, announced: bool) -> bool:
        digits = "".join(groups)
        if not 7 <= len(digits) <= 13 or _broken_twice(written) or _unbalanced(written):
            return False
        if announced:
            valid = self._is_any(digits) if len(groups) == 1 else self._has_trunk(digits)
            return valid or self._is_printed(written, groups, digits)
        if (
            (_is_sequence(digits) and (digits[0] != "0" or len(groups) == 1))
            or not self._is_printed(written, groups, digits)
            or announces_other(left)
        ):
            return False
        if len(groups) == 1:
            return left[-1:] not in _PART_OF_A_NAME and not _SUFFIX.match(shadow, start + len(written))
        spaces = not set(written) & set("()./-")
        return not (spaces and _in_a_row(shadow, start + len(written)))

    def _is_any(self, digits: str) -> bool:
        """Return whether the digits are a valid number, with trunk prefix or without."""
        return self._has_trunk(digits) or (self._any is not None and self._any.fullmatch(digits) is not None)

    def _has_trunk(self, digits: str) -> bool:
        return any(plan.fullmatch(digits) for trunk, plan in self._trunks.items() if digits.startswith(trunk))

    def _is_printed(self, written: str, groups: list[str], digits: str) -> bool:
        """Return whether the number is written in a way that is evidence by itself."""
        if written[0] == "(":
            plausible = len(digits) >= 8 and not _YEAR_IN_PARENTHESES.match(written)
            return plausible and len(groups) > 1 and self._is_any(digits)
        hyphens = written.count("-")
        for trunk, plan in self._trunks.items():
            if (
                digits.startswith(trunk)
                and _is_usual_behind_trunk(trunk, groups, digits, hyphens)
                and plan.fullmatch(digits)
            ):
                return True
        key = "-".join(str(len(group)) for group in groups)
        plans = self._printed.get(key, ())
        if len(groups) > 2 and written[-5:-4] == "-":
            plans = (*plans, *self._printed.get(".".join(key.rsplit("-", 1)), ()))
        amount = key == "3-3-3" and (digits.endswith("000") or "." in written or "," in written)
        return not amount and any(plan.fullmatch(digits) for plan in plans)


def _is_usual_behind_trunk(trunk: str, groups: list[str], digits: str, hyphens: int) -> bool:
    if len(digits) < 9:
        return False
    if len(groups) == 1:
        # Twelve digits are often a product's; German and Indonesian mobile numbers are as long.
        return len(digits) in (10, 11) or re.match("08|01[567]", digits) is not None
    behind = groups[1:] if groups[0] == trunk else groups
    if len(behind) < 2 or min(map(len, behind)) < 2:
        return False
    # Pairs of digits are drawn, counted and measured more often than dialled, but for five of them; an ISBN begins 0-.
    return len(groups) == 5 if max(map(len, groups)) == 2 else behind is groups or len(groups) > 3 or hyphens == 0


def _broken_twice(written: str) -> bool:
    """Return whether line ends part more than two groups, or are all that parts them, as in a column of numbers."""
    lines = written.count("\n")
    return lines > 1 or (lines == 1 and len(_GROUP.findall(written)) < 3)


def _unbalanced(written: str) -> bool:
    return written.count("(") != written.count(")")


def _is_sequence(digits: str) -> bool:
    """Return whether the digits count up, or are all the same."""
    return digits in _COUNTING or digits == digits[0] * len(digits)


def _in_a_row(shadow: str, end: int) -> bool:
    """Return whether groups of digits that end at `end` are only the first of a row of numbers.

    Only a following group that no entity begins with counts: a result that depended on text which is replaced would
    not be the same for the redacted text.
    """
    if not _ROW_AFTER.match(shadow, end):
        return False
    before = shadow[max(0, end - 4) : end + 1]
    return card(shadow, end + 1, before) < 0 and social_security(shadow, end + 1, before) < 0
