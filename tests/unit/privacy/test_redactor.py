"""Properties of the redactor, for arbitrary texts and every chunking."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.privacy.redactor import PiiKind, PiiMatch, Redactor, StreamRedactor, TooMuchWorkError
from tests.examples import examples
from tests.waiting import happens

REDACTOR = Redactor()
GERMAN = Redactor(phone_regions=["DE"])

ENTITIES = """jane.doe@example.com
a@b.co|(415) 555-2671|415-555-2671|4155552671|+49 30 901820|+1 415 555 0123|030 901820
4111111111111111|4111 1111 1111 1111|3782 822463 10005|DE89370400440532013000|GB29 NWBK 6016 1331 9268 19
be71096123456769|123-45-6789|123.45.6789|1.2.3.4|192.168.1.254|2001:db8::1|::1|2001:db8::|::ffff:1.2.3.4
sk-abcdefghijABCDEFGHIJ01|2001:0db8:85a3:0000:0000:8a2e:0370:7334|llm_k7f3a9_qwertyuiopasdfgh
hf_abcdefghijklmnopqrst|ghp_abcdefghijklmnopqrst|AKIAIOSFODNN7EXAMPLE|xoxb-1234567890-abc
eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0|eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc-_|jane＠example．com
４１５-555-2671|٤١٥-555-2671|"john doe"@example.com|jane%40example.com|jane&#64;example.com
jane [at] example [dot] com|jane dot doe at example dot com|jane(at)example.com|用户@例子.中国
user@مثال.السعودية|उपयोग@उदाहरण.भारत|98765 43210|138 0013 8000|11 98765-4321|8 (912) 345-67-89|06 12 34 56 78
(011) 15-2345-6789|0170/1234567|4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1|912-70-1234|phone: 612345678
Authorization: Bearer abc123def456ghi789|ssh me@example.com|@me@social.example|git@example.com|version 1.2.3.4
order 415-555-2671""".replace("\n", "|").split("|")
ENTITIES += [
    "jane.doe@\nexample.com",
    "jane\n@example.com",
    "jane@example.\ncom",
    "4111 1111\n1111 1111",
    "DE89 3704 0044\n0532 0130 00",
    "123-45-\n6789",
    "+49 30\n901820",
    "4111 | 1111 | 1111 | 1111",
    "call me at 5552671999",
    r"-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA\nabcdefgh=\n-----END PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMIIEowIBAAKCAQEA7bq\nabcdefghijklmnop+/=\n-----END PRIVATE KEY-----",
]
ODDMENTS = ["@", "@x.com", "eyJ", "sk-", "llm_", "::", ".", "-", "_", "+", "(", ")", "/", ":", ",", "'", "%", "[", "]"]
ODDMENTS += [
    "[EMAIL]",
    " ",
    "  ",
    "\n",
    "\r\n",
    '"',
    " at ",
    " dot ",
    "[at]",
    "(dot)",
    "&#64;",
    "%40",
    "=",
    "~",
    "#",
    "|",
    "\t",
    "\u00a0",
    "\u2011",
    "\u200b",
    "\u00ad",
    "\u200b" * 16,
    "\u200b" * 17,
]
ODDMENTS += [
    "é",
    "я",
    "字",
    "\ud800",
    "x",
    "f",
    "5",
    "00",
    " is ",
    "word",
    ".5",
    "-5",
    "DE89",
    "2024-01-01",
    "7 plus 5",
]
ODDMENTS += ["x" * 60, "a" * 70, "." * 66, "1" * 40, "eyJhbGciOiJIUzI1NiJ9"]


@st.composite
def broken(draw: st.DrawFn) -> str:
    """An entity that is truncated at either end, or has something inserted."""
    whole = draw(st.sampled_from(ENTITIES))
    at = draw(st.integers(0, len(whole)))
    return draw(st.sampled_from([whole[:at], whole[at:], whole[:at] + draw(st.sampled_from(ODDMENTS)) + whole[at:]]))


FRAGMENTS = st.one_of(
    st.sampled_from(ENTITIES),
    st.sampled_from(ODDMENTS),
    broken(),
    st.text(max_size=6),
    st.text("0123456789 -.()+", max_size=40),
    st.text("abf019:.@-", max_size=40),
    st.text("1234 ", max_size=60),
    st.lists(st.sampled_from(["jane", "at", "dot", "com", "[at]", "the", "@", ".", '"']), max_size=9).map(" ".join),
)
TEXTS = st.lists(FRAGMENTS, max_size=9).map("".join)
UNBROKEN = st.tuples(
    st.sampled_from(["a", "1", "@", "a@", "a@b.", "1:", "eyJ", "sk-", ".", "\u200b", "a\u200b", "é"]), TEXTS
).map(lambda parts: (parts[0] * 5000)[:5000] + parts[1])
FIVE_HUNDRED = examples(500)


def chunks_of(text: str, sizes: Sequence[int]) -> Iterator[str]:
    """Split `text` into chunks of `sizes` characters, repeated in turn."""
    start = turn = 0
    while start < len(text):
        yield text[start : start + sizes[turn % len(sizes)]]
        start += sizes[turn % len(sizes)]
        turn += 1


def streamed(redactor: Redactor, chunks: Iterable[str]) -> tuple[list[str], dict[PiiKind, int]]:
    """Return the output for each chunk and at the end, and the counts."""
    stream = StreamRedactor(redactor)
    output = [stream.feed(chunk) for chunk in chunks]
    return [*output, stream.finish()], stream.counts


@pytest.mark.parametrize("text", ["jane at at com dot me ", "me at at org dot me at at x.y", "a dot at at b dot com"])
def test_a_stream_takes_signs_in_a_row_as_the_whole_does(text: str) -> None:
    """Which of two words is the sign does not depend on what has been sent of the text before them."""
    expected = REDACTOR.redact(text).text

    assert {expected} == {"".join(streamed(REDACTOR, chunks_of(text, [size]))[0]) for size in range(1, len(text))}
    assert "[EMAIL]" == REDACTOR.redact("pat at example dot com").text


@pytest.mark.parametrize("sign", [" [at] ", "[at]", " at ", "\n@", "&#64;"])
def test_a_name_in_quotes_waits_for_its_sign_however_that_is_written(sign: str) -> None:
    """No part of it is sent before it is known whether an address goes on."""
    domain = "example dot com" if sign == " at " else "example.com"
    text = f'so "john doe"{sign}{domain} is it'
    expected = REDACTOR.redact(text).text

    assert "john" not in expected
    assert {expected} == {"".join(streamed(REDACTOR, chunks_of(text, [size]))[0]) for size in range(1, len(text))}


@pytest.mark.parametrize("before", ["call ", "sk-Abcdefgh0123456789AB", "a \u200b"])
def test_a_stream_that_refuses_work_has_taken_nothing(before: str) -> None:
    """So that the same text can be tried elsewhere."""
    rest = "c.d " + "1234567 " * 20 + "jane@example.com."
    stream = StreamRedactor(REDACTOR)
    sent = stream.feed(before)
    state = stream.state

    with pytest.raises(TooMuchWorkError):
        stream.feed(rest, max_attempts=3)

    assert state == stream.state
    assert REDACTOR.redact(before + rest).text == sent + stream.feed(rest) + stream.finish()


KEY_BODY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq"


@pytest.mark.parametrize(
    "rest",
    [" [at] example [dot] com", "  \n- a list", "\n\n  hkiG9w0B\n-----END PRIVATE KEY-----\n", " " * 40 + "word", " "],
)
def test_a_private_key_ends_in_a_stream_where_it_does_in_the_whole(rest: str) -> None:
    """White space behind it is its own only if more of it follows."""
    expected = REDACTOR.redact(KEY_BODY + rest).text

    assert expected.startswith("[API_KEY]")
    assert {expected} == {
        "".join(streamed(REDACTOR, chunks_of(KEY_BODY + rest, [size]))[0]) for size in range(1, len(KEY_BODY + rest))
    }


@FIVE_HUNDRED
@given(TEXTS, st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.sampled_from([REDACTOR, GERMAN]))
def test_a_stream_equals_the_redacted_text_for_every_chunking(text: str, sizes: list[int], redactor: Redactor) -> None:
    """The joined output and the counts are those of the whole text, with empty chunks too."""
    expected = redactor.redact(text)

    output, counts = streamed(redactor, chunks_of(text, sizes))

    assert (expected.text, expected.counts) == ("".join(output), counts)


@FIVE_HUNDRED
@given(TEXTS)
# An address whose 64 characters before the "@" reach into text that was sent already.
@example("1" * 42 + "5-555-2671415-555-2671jane.doe@example.comjane.doe@example.com")
def test_the_output_so_far_never_contains_a_part_of_an_entity(text: str) -> None:
    """Fed by single characters, it is a prefix of the redacted text at any moment."""
    expected = REDACTOR.redact(text).text
    stream, sent = StreamRedactor(REDACTOR), ""

    for character in text:
        sent += stream.feed(character)
        assert expected.startswith(sent)

    assert expected == sent + stream.finish()


@FIVE_HUNDRED
@given(TEXTS, st.integers(0, 200))
def test_text_that_was_sent_does_not_depend_on_later_text(text: str, size: int) -> None:
    """It is a prefix of the redacted text for two different endings."""
    stream = StreamRedactor(REDACTOR)
    sent = stream.feed(text[:size])

    assert REDACTOR.redact(text).text.startswith(sent)
    assert REDACTOR.redact(text[:size] + "@example.com 4111 1111 1111 1111").text.startswith(sent)


@FIVE_HUNDRED
@given(TEXTS, st.sampled_from([REDACTOR, GERMAN]))
def test_redaction_is_idempotent(text: str, redactor: Redactor) -> None:
    """Placeholders are not entities, and the text beside them does not become one."""
    once = redactor.redact(text).text

    assert once == redactor.redact(once).text
    assert not redactor.find(once)


@FIVE_HUNDRED
@given(TEXTS)
def test_matches_are_sorted_and_disjoint_and_explain_the_redacted_text(text: str) -> None:
    """Replacing the spans of `find`, from the last to the first, gives the text of `redact`."""
    matches, by_hand = REDACTOR.find(text), text

    for match in reversed(matches):
        by_hand = f"{by_hand[: match.start]}[{match.kind.upper()}]{by_hand[match.end :]}"

    assert all(match.start < match.end for match in matches)
    assert all(one.end <= next_.start for one, next_ in pairwise(matches))
    assert REDACTOR.redact(text).text == by_hand


@examples(40)
@given(UNBROKEN, st.integers(90, 900))
def test_the_buffer_is_bounded_in_texts_without_a_delimiter(text: str, size: int) -> None:
    """5,000 characters without one: the same result, and at most the longest entity is withheld."""
    output, _ = streamed(REDACTOR, chunks_of(text, [size]))

    assert REDACTOR.redact(text).text == "".join(output)
    # The longest open entity is an e-mail address of 641 characters, each followed by 16 invisible ones.
    assert len(output[-1]) <= 641 * 17


def test_ordinary_prose_is_delayed_by_one_word() -> None:
    """A word is sent with the first letter of the next one, a number one character later."""
    text = "Hello, this is a plain sentence: 7 plus 5 is 12 (in words, twelve) since 1999 or so, he said."
    stream, sent = StreamRedactor(REDACTOR), ""

    for end, character in enumerate(text, start=1):
        sent += stream.feed(character)
        buffered = text[len(sent) : end]
        assert len(buffered) <= 10
        if any(map(str.isdigit, buffered)):
            assert buffered.strip(" ().,").count(" ") <= 2
        else:
            # A word that may become "at" or "dot" keeps the one before it.
            *words, last = buffered.split() or [""]
            assert not words or (len(words) == 1 and last in ("a", "at", "d", "do", "dot"))

    assert text == sent + stream.finish()


def test_text_that_may_become_an_entity_is_withheld() -> None:
    """An unfinished address, number or key is not sent until something ends it."""
    for beginning in [
        "a@b",
        "jane",
        "415-555",
        "+49 30 ",
        "4111 1111 1111",
        "DE89 3704",
        "123-45",
        "10.0.0",
        "fe80:",
        "sk-a",
        "eyJ",
    ]:
        assert "" == StreamRedactor(REDACTOR).feed(beginning), beginning


def test_a_key_of_any_length_is_replaced_as_soon_as_it_is_recognised() -> None:
    """The rest of a long key is dropped as it arrives, and the text after it is sent."""
    stream = StreamRedactor(REDACTOR)

    output = [
        stream.feed(chunk)
        for chunk in ["eyJhbGciOiJIUzI1NiJ9.", "a" * 5000, "." + "b" * 900, ".", "c\u200b", "\u200b9", ". so"]
    ]

    assert "[API_KEY]. so" == "".join(output) + stream.finish()
    assert "[API_KEY]" == "".join(output[:2])
    assert {PiiKind.API_KEY: 1} == stream.counts


def test_a_finished_stream_rejects_more_text() -> None:
    """Its rest is returned once; text after it is an error of the caller."""
    stream = StreamRedactor(REDACTOR)
    stream.feed("jane@example.com")

    assert ["[EMAIL]", ""] == [stream.finish(), stream.finish()]
    with pytest.raises(ValueError, match="finished"):
        stream.feed("x")


def test_only_the_configured_kinds_are_replaced() -> None:
    """Other kinds are unchanged, even if none is configured."""
    text = "jane@example.com 415-555-2671 10.0.0.1"

    assert "[EMAIL] 415-555-2671 10.0.0.1" == Redactor([PiiKind.EMAIL]).redact(text).text
    assert "jane@example.com 415-555-2671 [IP]" == Redactor([PiiKind.IP]).redact(text).text
    assert text == Redactor([]).redact(text).text
    assert text == "".join(streamed(Redactor([]), text)[0])


def test_matches_are_offsets_of_the_original() -> None:
    """Look-alikes and invisible characters do not shift the span."""
    text = "é ja\u200bne＠example.com\u200b!"

    assert [PiiMatch(PiiKind.EMAIL, 2, 19)] == REDACTOR.find(text)
    assert "ja\u200bne＠example.com" == text[2:19]


def test_the_fingerprint_identifies_the_policy() -> None:
    """Equal policies share cached answers and different ones do not; the order of the kinds does not matter."""
    assert Redactor([PiiKind.IP, PiiKind.EMAIL]).fingerprint == Redactor([PiiKind.EMAIL, PiiKind.IP]).fingerprint
    different = [Redactor(), Redactor([PiiKind.EMAIL]), Redactor([]), Redactor(phone_regions=["DE"])]
    assert len(different) == len({redactor.fingerprint for redactor in different})


def test_an_unknown_region_or_kind_is_rejected() -> None:
    """A misspelt one would silently let personal data pass."""
    with pytest.raises(ValueError, match="unknown phone region 'us'"):
        Redactor(phone_regions=["us"])
    with pytest.raises(ValueError, match="mail"):
        Redactor(["mail"])  # type: ignore[list-item]  # a word that the configuration may have


def test_threads_may_share_a_redactor() -> None:
    """Eight threads at once get the same result as one."""
    text = " ".join(ENTITIES)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(REDACTOR.redact, [text] * 64))

    assert [REDACTOR.redact(text)] * 64 == results


ATTACKS = [
    "a",
    "1",
    "@",
    "a@",
    "a@b.",
    "1 ",
    "12 34 56 78 ",
    "+1 2 3 4 5 6 7 8 9 0 ",
    "4111 ",
    "(415) 555-2671 ",
    "AB12 ",
    "DE89 ",
]
ATTACKS += [
    "1:",
    "fe80::1 ",
    "ab::cd:",
    "1.2.3.4.",
    "-eyJ",
    "eyJ",
    "-sk-",
    "a.",
    "jane@example.com ",
    "a\u200b",
    "\u200b",
    "(",
    "+",
]
ATTACKS += ["a@" + "x" * 63 + ".", "." * 64 + "@", "a@b.c.d.e.f.g.h.i.j.", "212-", "llm_", "DE89370400440532013001 "]
ATTACKS += [
    '"',
    '" ',
    '"a b',
    "[at]",
    "a [at] ",
    " at ",
    "a at b dot ",
    " dot ",
    "&#64;",
    "%40",
    "@\n",
    "a\n",
    "\n",
    "1\n",
]
ATTACKS += [
    "-----BEGIN PRIVATE KEY-----\n",
    "-----BEGIN ",
    "-",
    "Authorization: Bearer ",
    "phone 12 34 56 7",
    "tel: ",
    "06 ",
]
ATTACKS += [
    "4 1 ",
    "4|",
    "0 5",
    "(0",
    "用户@",
    "字",
    "电话1",
    "8 (912) ",
    "98765 ",
    "98765 43210 12 ",
    "0123456789 ",
    "ssh ",
]


def seconds_of(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread, which the load of the machine hardly changes."""
    before = time.thread_time()
    work()
    return time.thread_time() - before


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_time_is_linear_in_the_length(attack: str) -> None:
    """Four times the text takes about four times as long (a square would be sixteen); a few milliseconds are noise."""
    short, long = (attack * 8000)[:8000], (attack * 32000)[:32000]

    assert happens(
        lambda: seconds_of(lambda: REDACTOR.redact(long)) < 7 * seconds_of(lambda: REDACTOR.redact(short)) + 0.005
    )
    assert happens(lambda: seconds_of(lambda: REDACTOR.redact(short)) < 2)


@pytest.mark.parametrize("attack", [*ATTACKS[:18], *ATTACKS[32::3]], ids=ascii)
def test_the_time_of_a_delta_does_not_grow_with_the_stream(attack: str) -> None:
    """Fed by single characters, the next 700 take about as long as the first."""
    text = (attack * 700)[:700]

    def later_is_as_fast() -> bool:
        stream = StreamRedactor(REDACTOR)
        first = seconds_of(lambda: [stream.feed(character) for character in text])
        later = seconds_of(lambda: [stream.feed(character) for character in text])
        return later < 3 * first + 0.02

    assert happens(later_is_as_fast)
