"""Personal data in ordinary notation and in look-alike characters, and texts that only resemble it."""

import re

import pytest
from stdnum import iban, numdb

from app.privacy.redactor import PiiKind, Redactor

IBAN_STRUCTURES = {country: properties["bban"] for _, country, _, properties, _ in numdb.get("iban").prefixes}
"""By country, as in 8!n10!c: the number of digits, letters or either in each part of a BBAN."""
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
ARABIC = {ord("0") + digit: 0x0660 + digit for digit in range(10)}
MATHEMATICAL = {ord("0") + digit: 0x1D7CE + digit for digit in range(10)}
CIRCLED = {ord("0"): 0x24EA} | {ord("1") + digit: 0x2460 + digit for digit in range(9)}

FOUND = {
    PiiKind.EMAIL: [
        "jane.doe@example.com",
        "JANE+tag@mail.example.co.uk",
        "o'brien@example.ie",
        "jürgen@müller.de",
        "почта@пример.рф",
        "a_b%c@xn--e1afmkfd.xn--p1ai",
        "jane.doe@example.com".translate(FULL_WIDTH),
        "jane\uff20example.com",
        "jane@example\uff0ecom",
        "jane@example\u3002com",
        "ja\u200bne@exam\u00adple.c\u2060om",
        "j\u200da\u200cn\ufeffe@example.com",
        "jane\u2010doe@example.com",
        "x" * 64 + "@example.com",
    ],
    PiiKind.PHONE: [
        "(415) 555-2671",
        "415-555-2671",
        "415.555.2671",
        "415 555 2671",
        "4155552671",
        "1-415-555-2671",
        "1 (415) 555-2671",
        "+1 415 555 0123",
        "(555) 123-4567",
        "+49 30 901820",
        "+49 (0)30 901820",
        "+44 20 7946 0958",
        "+33 1 42 68 53 00",
        "+7 912 345-67-89",
        "+86 138 0013 8000",
        "0049 30 901820",
        "415\u2011555\u20112671",
        "415\u2212555\u20132671",
        "415\u00a0555\u00a02671",
        "415\u30fc555\u30fc2671",
        "(415) 555-2671".translate(FULL_WIDTH),
        "415-555-2671".translate(ARABIC),
        "415-555-2671".translate(CIRCLED),
        "+49 30 901820".translate(MATHEMATICAL),
        "4\ufe0f\u20e31\ufe0f\u20e35\ufe0f\u20e3-555-2671",
    ],
    PiiKind.CARD: [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "5555555555554444",
        "2223003122003222",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "30569309025904",
        "3530111333300000",
        "6304000000000000",
        "4222222222222",
        "1234 5678 1234 5670",
        "4111\u00a01111\u00a01111\u00a01111",
        "4111\u20091111\u202f1111\u30001111",
        "4111\u20111111\u20121111\u20131111",
        "4111\u20141111\u20151111\u22121111",
        "4111\u200b1111\u200c1111\u200d1111",
        "4\u00ad111\u20601111\ufeff11111111",
        "4111 1111 1111 1111".translate(FULL_WIDTH),
        "4111 1111 1111 1111".translate(ARABIC),
        "4111111111111111".translate(MATHEMATICAL),
        "4111111111111111".translate(CIRCLED),
        "4111" + "\u200b" * 16 + "111111111111",
    ],
    PiiKind.IBAN: [
        "DE89370400440532013000",
        "DE89 3704 0044 0532 0130 00",
        "GB29 NWBK 6016 1331 9268 19",
        "gb29nwbk60161331926819",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO93 8601 1117 947",
        "MT84MALT011000012345MTLCAST001S",
        "DE89-3704-0044-0532-0130-00",
        "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
        "DE89 3704 0044 0532 0130 00".translate(FULL_WIDTH),
    ],
    PiiKind.SSN: [
        "123-45-6789",
        "123 45 6789",
        "123.45.6789",
        "078-05-1120",
        "987-65-4320",
        "912-70-1234",
        "123\u201145\u20116789",
        "123\u00a045\u00a06789",
        "123\u200b-45-\u200b6789",
        "123-45-6789".translate(FULL_WIDTH),
        "123-45-6789".translate(ARABIC),
    ],
    PiiKind.IP: [
        "192.168.1.254",
        "8.8.8.8",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "2001:db8::8a2e:370:7334",
        "fe80::1",
        "::ffff:192.0.2.1",
        "dead:beef::cafe",
        "192.168.1.254".translate(FULL_WIDTH),
        "192\u2024168\u20241\u2024254",
        "192.168\u200b.1.254",
    ],
    PiiKind.API_KEY: [
        "sk-abcdefghijABCDEFGHIJ0123",
        "sk-proj-" + "Ab1_" * 30,
        "sk-ant-api03-" + "Zz9-" * 24,
        "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc",
        "llm_k7f3a9_" + "q" * 32 + "1a2b3c4d",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
        "ghp_" + "a1B2" * 9,
        "github_pat_11ABCDEFG0_" + "abcDEF123" * 6,
        "AKIA" + "IOSFODNN7EXAMPLE",
        "xox" + "b-123456789012-abcdefABCDEF",
        "AIza" + "SyA-1234567890abcdefghijklmnopqrstu",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "eyJ" + "a" * 300 + "." + "b" * 3000 + "." + "c" * 500,
        "hf_abcdefghijklmnop\u200bqrstuvwxyz",
        "sk-" + "aB3" * 2000,
    ],
}

NOT_FOUND = """
2024-01-01 | 01/02/2024 | 2024-01-01 2024-01-05 | 2024-01-01T10:30:00Z | 10:30 | 10:30:45.123 | from 10:30 to 11:45
1.2.3 | v1.2.3.4 | 1.2.3.4.5 | Python 3.11.7 | numpy 2.4.6 | 999.1.2.3 | 256.256.256.256 | 1.3.6.1.4.1.311.21
$1,234,567.89 | 19.99 | $4155552671 | 1 000 000 | 100 200 300 | 7 plus 5 | 7 + 5 = 12
+0 000 000 00 | +999 123 456 789 | +0000000 | 415 - 555 = -140
order 12345 | ticket 1234567 | 555-0123 | the years 1990 1991 1992 1993 | 1990-1995 | call 911 | 12345-6789 | 0123456789
6.02214076e23 | 3.14159265358979 | 1.602176634e-19 | 299792458 | 2147483647 | 1700000000 | 1700000000000
0.4111111111111111 | -4111111111111112
4111111111111112 | 41111111111111111111111 | 9780306406157 | 978-604-77-1234-5 | 000-12-3456
666-12-3456 | 123-45-67890
12345678-1234-1234-1234-123456789012 | 550e8400-e29b-41d4-a716-446655440000 | d41d8cd98f00b204e9800998ecf8427e
:: | x[::2] | a[1::2] | a[:, ::5] | std::vector | f64::add(1) | f32::MAX | 00:1a:2b:3c:4d:5e | key:value
43:51:43:a1:b5:fc:8b:b7:0a:3a:a9:b1:0f:66:73:a8 | 12:34:56:78:90:12:34:56
@ | a@b | user@localhost | @jane | me @ home.com | foo@bar..com | @x.com | [EMAIL] [CARD] [API_KEY] [IP]
sk-learn | sk-estimator-doc-link-container | hf_model | ghp_short | AKIA | eyJ | eyJhbGciOiJIUzI1NiJ9
llm_engine_config
DE89 is not | DE89370400440532013001 | GB is at 12 | in 2024 and 2025 | x² + y² = z² | 第2024年第1季度
"""


@pytest.mark.parametrize(("kind", "written"), [(kind, written) for kind, each in FOUND.items() for written in each])
def test_personal_data_is_replaced(kind: PiiKind, written: str) -> None:
    """On its own and inside a sentence, the entity is replaced and the text around it is not."""
    redactor = Redactor()

    by_itself, inside = redactor.redact(written), redactor.redact(f"It is ({written}), I think.")

    placeholder = f"[{kind.upper()}]"
    assert (placeholder, {kind: 1}) == (by_itself.text, by_itself.counts)
    assert f"It is ({placeholder}), I think." == inside.text


@pytest.mark.parametrize("country", IBAN_STRUCTURES)
def test_account_numbers_of_every_country_in_the_registry_are_replaced(country: str) -> None:
    """With and without spaces, up to the last character of the country's structure and no further."""
    characters = {"n": "1", "a": "B", "c": "C"}
    bban = "".join(
        characters[kind] * int(size) for size, kind in re.findall(r"([0-9]+)!([nac])", IBAN_STRUCTURES[country])
    )
    written = f"{country}{iban.calc_check_digits(f'{country}00{bban}')}{bban}"

    assert "[IBAN]" == Redactor().redact(written).text
    assert "to [IBAN] please" == Redactor().redact(f"to {iban.format(written)} please").text


@pytest.mark.parametrize(
    "written", [case.strip() for line in NOT_FOUND.strip().split("\n") for case in line.split(" | ")]
)
def test_text_that_only_resembles_personal_data_is_unchanged(written: str) -> None:
    """Dates, versions, prices, identifiers, code and failed checksums are unchanged."""
    assert written == Redactor().redact(written).text
    assert f"so {written}, ok" == Redactor().redact(f"so {written}, ok").text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4111 1111 1111 1111 123", "[CARD] 123"),
        ("415-555-2671x123", "[PHONE]x123"),
        ("10.0.0.1-10.0.0.9/24", "[IP]-[IP]/24"),
        ("http://[2001:db8::1]:8080/", "http://[[IP]]:8080/"),
        ("http://[::1]:8080/", "http://[::1]:8080/"),
        ("fe80::1: no route", "[IP]: no route"),
        ("...jane@example.com.", "...[EMAIL]."),
        ("请联系jane@example.com谢谢", "请联系[EMAIL]谢谢"),
        ("卡号4111111111111111。", "卡号[CARD]。"),
        ("4155552671@example.com", "[EMAIL]"),
        ("me@example.com,you@example.com", "[EMAIL],[EMAIL]"),
        ("call me(415) 555-2671", "call me[PHONE]"),
        ("x\u200b jane@example.com\u200b y", "x\u200b [EMAIL]\u200b y"),
        ("415-555-2671415-555-2671", "415-555-2671415-555-2671"),
        ("x" * 300 + "@example.com", "x" * 236 + "[EMAIL]"),
        ("1" * 80 + "@example.com", "1" * 80 + "@example.com"),
        ("4111" + "\u200b" * 17 + "111111111111", "4111" + "\u200b" * 17 + "111111111111"),
        ("\ud800jane@example.com\udfff", "\ud800[EMAIL]\udfff"),
    ],
)
def test_an_entity_ends_before_the_text_around_it(text: str, expected: str) -> None:
    """Extensions, full stops, networks and other scripts around an entity are not part of it."""
    assert expected == Redactor().redact(text).text


def test_entities_are_found_after_more_characters_than_are_cached() -> None:
    """Lone surrogates among them."""
    every = "".join(map(chr, range(0x4E00, 0xE000)))

    assert every + " [EMAIL]" == Redactor().redact(every + " jane＠example.com").text


def test_a_country_code_that_does_not_exist_has_no_numbers() -> None:
    """A candidate that cannot be parsed is unchanged."""
    assert "00 999 12345" == Redactor(phone_regions=["DE"]).redact("00 999 12345").text


def test_national_numbers_are_those_of_the_configured_region() -> None:
    """A German number without its country code is found only if Germany is the region."""
    text = "Ruf 030 901820 oder (0170) 1234567 an, am 01.02.2024 oder 2024-01-01."

    assert text == Redactor(phone_regions=["US"]).redact(text).text
    assert (
        "Ruf [PHONE] oder [PHONE] an, am 01.02.2024 oder 2024-01-01."
        == Redactor(phone_regions=["DE"]).redact(text).text
    )
