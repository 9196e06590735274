"""The numbering plans of `phonenumbers` as regular expressions over bare digits.

Each is compiled once: a number of any of thirty regions is recognised, or not, in a few of them, where that library's
parser would take one call for each region and each possible end of a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import phonenumbers
from phonenumbers.phonemetadata import PhoneMetadata

Plan = Callable[[str], re.Match[str] | None]
"""Says whether digits are a number of a plan."""

NORTH_AMERICA, _MEXICO = 1, 52
# 555, as area or exchange code, is reserved for fiction: invalid, but meant as a phone number.
_FICTION = r"555[0-9]{7}|[2-9][0-9]{2}555[0-9]{4}"
_NO_YEARS = r"(?!(?:1[5-9]|20)[0-9]{2}(?:1[5-9]|20))"

_MOBILE_INDIA, _MOBILE_CHINA, _MOBILE_BRAZIL = "[6-9][0-9]{9}", "1[3-9][0-9]{9}", "[1-9][1-9]9[0-9]{8}"
# Groups that regions print beside those in the metadata, without a trunk prefix: region, groups, digits.
_PRINTED: tuple[tuple[str, str, str], ...] = (
    ("IN", "5-5 3-3-4 4-3-3 4-6 2-4-4 2-8 10", _MOBILE_INDIA),
    ("CN", "3-4-4 3-8 11", _MOBILE_CHINA),
    ("BR", "2-5-4 2-9 2-1-4-4 11", _MOBILE_BRAZIL),
    ("BR", "2-4.4", "[1-9][1-9][2-5][0-9]{7}"),
    ("RU", "3-3-2-2 3-3-4 3-7", "(?:9|[348][0-9][1-9])[0-9]{8,9}"),
    ("TR", "3-3-2-2 3-3-4 3-7", "5[0-9]{9}|[2-4][1-9][0-9]{8}"),
    ("AR", "2-4-4 2-4.4", "11[2-9][0-9]{7}"),
    ("AR", "2-2-4-4", "1115[2-9][0-9]{7}"),
    ("AR", "3-3-4 3-3.4", "[23][0-9]{2}[2-9][0-9]{6}"),
    ("AR", "3-2-3-4 3-2-7", "[23][0-9]{2}15[2-9][0-9]{6}"),
    ("ES", "3-3-3 3-2-2-2 2-3-2-2 3-6", "[679][0-9]{8}"),
    ("PT", "3-3-3 2-3-4", "9[0-9]{8}|2[12][0-9]{7}"),
    ("IT", "3-3-4 3-7 3-2-2-3 3-3-2-2", "3[0-9]{8,9}"),
    ("PL", "3-3-3", "(?:45|5[0137]|6[0569]|7[2389]|88)[0-9]{7}"),
    ("PL", "2-3-2-2", "[1-9][0-9]{8}"),
    ("MX", "2-4-4 3-3-4 2-2-2-2-2", "[2-9][0-9]{9}"),
    ("GR", "3-3-4 3-7", "(?:69|2)[0-9]{8,9}"),
    ("DK", "2-2-2-2", "[2-9][0-9]{7}"),
    ("NO", "3-2-3 2-2-2-2", "[2-9][0-9]{7}"),
)
# Behind a trunk prefix, where the parser of `phonenumbers` would turn the digits round first: 15 marks a mobile phone.
_BEHIND_TRUNK = {"AR": ("0(?:11|[23][0-9]{2,3})15[2-9][0-9]{5,7}",)}


@cache
def country_plan(code: int) -> Plan | None:
    """Return the plan of a country code, a trunk prefix by mistake included; None if nobody has the code."""
    plans = [region_plan(region, code) for region in phonenumbers.COUNTRY_CODE_TO_REGION_CODE.get(code, ())]
    known = [plan for plan in plans if plan]
    if not known:
        return None
    # Every region of a country code has its own valid numbers, but the prefix is the main one's.
    metadata = PhoneMetadata.metadata_for_region_or_calling_code(
        code, phonenumbers.COUNTRY_CODE_TO_REGION_CODE[code][0]
    )
    # Mexico dropped the 1 before mobile numbers in 2019.
    trunk = (metadata.national_prefix if metadata else None) or ("1" if code == _MEXICO else "")
    fiction = f"|{_FICTION}" if code == NORTH_AMERICA else ""
    return re.compile(f"(?:{trunk})?(?:{'|'.join(known)}{fiction})").fullmatch


@cache
def region_plan(region: str, code: int | None = None) -> str:
    """Return a pattern of the digits of every valid number of a region, without trunk prefix."""
    metadata = PhoneMetadata.metadata_for_region_or_calling_code(
        code or phonenumbers.country_code_for_region(region), region
    )
    if metadata is None:
        return ""
    kinds = (
        *(metadata.fixed_line, metadata.mobile, metadata.toll_free, metadata.premium_rate, metadata.shared_cost),
        *(metadata.voip, metadata.personal_number, metadata.uan, metadata.pager),
    )
    patterns = {each.national_number_pattern for each in kinds if each and each.national_number_pattern}
    return "|".join(f"(?:{pattern})" for pattern in sorted(patterns))


@cache
def north_american_plan() -> Plan:
    regions = phonenumbers.COUNTRY_CODE_TO_REGION_CODE[NORTH_AMERICA]
    return re.compile(f"1?(?:{'|'.join(region_plan(region) for region in regions)}|{_FICTION})").fullmatch


def trunk_prefix(region: str) -> str:
    """Return what is dialled before a national number within its region; empty in many regions."""
    metadata = PhoneMetadata.metadata_for_region(region)
    return (metadata.national_prefix if metadata else None) or ""


def behind_trunk(region: str, trunk: str) -> list[str]:
    """Return patterns of a region's numbers with their trunk prefix."""
    if not trunk:
        # A zero of the number itself, as in Italy, is as good as a trunk prefix.
        return [f"(?=0)(?:{region_plan(region)})"]
    return [f"{trunk}(?:{region_plan(region)})", *_BEHIND_TRUNK.get(region, ())]


def printed_groups(region: str, trunk: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield the groups, as "3-3-4", in which a region prints numbers without trunk prefix, and their digits."""
    valid = region_plan(region)
    for listed, shapes, digits in _PRINTED:
        if listed == region:
            plan = re.compile(f"(?:{digits})" if region == "AR" else f"(?=(?:{digits})$)(?:{valid})")
            for shape in shapes.split():
                yield shape, plan
    metadata = PhoneMetadata.metadata_for_region(region)
    if metadata is None or any(listed == region for listed, _, _ in _PRINTED):
        return
    for each in metadata.number_format:
        if trunk and trunk in (each.national_prefix_formatting_rule or ""):
            continue
        sizes = re.findall(r"\(\\d(?:\{([0-9]+)(?:,([0-9]+))?\})?\)", each.pattern or "")
        ranges = [range(int(low or 1), int(high or low or 1) + 1) for low, high in sizes]
        leading = each.leading_digits_pattern[-1] if each.leading_digits_pattern else ""
        pattern = f"(?={leading})(?:{valid})"
        for groups in product(*ranges):
            if len(groups) > 1 and sum(groups) > 7 and min(groups) > 1:
                # Twice four digits may be years.
                yield "-".join(map(str, groups)), re.compile((_NO_YEARS if groups == (4, 4) else "") + pattern)
