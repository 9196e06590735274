"""The promises of the PII filter, for every text and every way to cut it."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.privacy.redactor import PiiKind, PiiMatch, Redactor, StreamRedactor

REDACTOR = Redactor()
GERMAN = Redactor(phone_region="DE")

ENTITIES = """jane.doe@example.com|a@b.co|(415) 555-2671|415-555-2671|4155552671|+49 30 901820|+1 415 555 0123
030 901820|4111111111111111|4111 1111 1111 1111|3782 822463 10005|DE89370400440532013000|GB29 NWBK 6016 1331 9268 19
be71096123456769|123-45-6789|123.45.6789|1.2.3.4|192.168.1.254|2001:db8::1|::1|2001:db8::|::ffff:1.2.3.4|sk-abcdefghijABCDEFGHIJ01
2001:0db8:85a3:0000:0000:8a2e:0370:7334|llm_k7f3a9_qwertyuiopasdfgh|hf_abcdefghijklmnopqrst|ghp_abcdefghijklmnopqrst
AKIAIOSFODNN7EXAMPLE|xoxb-1234567890-abc|eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0|eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc-_
jane＠example．com|４１５-555-2671|٤١٥-555-2671""".replace("\n", "|").split("|")
ODDMENTS = ["@", "@x.com", "eyJ", "sk-", "llm_", "::", ".", "-", "_", "+", "(", ")", "/", ":", ",", "'", "%", "[", "]"]
ODDMENTS += ["[EMAIL]", " ", "  ", "\n", "\t", "\u00a0", "\u2011", "\u200b", "\u00ad", "\u200b" * 16, "\u200b" * 17]
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
def broken(draw):
    """An entity with one of its ends cut off, or with something put into it."""
    whole = draw(st.sampled_from(ENTITIES))
    place = draw(st.integers(0, len(whole)))
    return draw(
        st.sampled_from([whole[:place], whole[place:], whole[:place] + draw(st.sampled_from(ODDMENTS)) + whole[place:]])
    )


FRAGMENTS = st.one_of(
    st.sampled_from(ENTITIES),
    st.sampled_from(ODDMENTS),
    broken(),
    st.text(max_size=6),
    st.text("0123456789 -.()+", max_size=40),
    st.text("abf019:.@-", max_size=40),
)
TEXTS = st.lists(FRAGMENTS, max_size=9).map("".join)
UNBROKEN = st.tuples(
    st.sampled_from(["a", "1", "@", "a@", "a@b.", "1:", "eyJ", "sk-", ".", "\u200b", "a\u200b", "é"]), TEXTS
).map(lambda parts: (parts[0] * 5000)[:5000] + parts[1])
FIVE_HUNDRED = settings(max_examples=500, deadline=None)


def pieces_of(text, sizes):
    """`text` cut into pieces of `sizes` characters, over and over again."""
    start = turn = 0
    while start < len(text):
        yield text[start : start + sizes[turn % len(sizes)]]
        start += sizes[turn % len(sizes)]
        turn += 1


def streamed(redactor, pieces):
    """What a stream gives out piece by piece, its end included, and what it counted."""
    stream = StreamRedactor(redactor)
    given_out = [stream.feed(piece) for piece in pieces]
    return [*given_out, stream.finish()], stream.counts


@FIVE_HUNDRED
@given(TEXTS, st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), st.sampled_from([REDACTOR, GERMAN]))
def test_a_stream_yields_what_the_whole_text_would(text, sizes, redactor):
    """However a text is cut, empty pieces included, the joined stream is the redacted whole, and the counts agree."""
    expected = redactor.redact(text)

    given_out, counts = streamed(redactor, pieces_of(text, sizes))

    assert (expected.text, expected.counts) == ("".join(given_out), counts)


@FIVE_HUNDRED
@given(TEXTS)
# An address whose 64 characters before the "@" reach into what was given out already.
@example("1" * 42 + "5-555-2671415-555-2671jane.doe@example.comjane.doe@example.com")
def test_no_prefix_shows_a_character_of_an_entity(text):
    """Fed character by character, all that was given out at any moment is a prefix of the redacted whole."""
    expected = REDACTOR.redact(text).text
    stream, sent = StreamRedactor(REDACTOR), ""

    for character in text:
        sent += stream.feed(character)
        assert expected.startswith(sent)

    assert expected == sent + stream.finish()


@FIVE_HUNDRED
@given(TEXTS, st.integers(0, 200))
def test_what_was_given_out_holds_for_every_ending(text, place):
    """A prefix given out does not depend on what comes later: it begins the redacted text for two different endings."""
    stream = StreamRedactor(REDACTOR)
    sent = stream.feed(text[:place])

    assert REDACTOR.redact(text).text.startswith(sent)
    assert REDACTOR.redact(text[:place] + "@example.com 4111 1111 1111 1111").text.startswith(sent)


@FIVE_HUNDRED
@given(TEXTS, st.sampled_from([REDACTOR, GERMAN]))
def test_redacting_twice_is_redacting_once(text, redactor):
    """Placeholders are no entities, and what stands beside them does not become one."""
    once = redactor.redact(text).text

    assert once == redactor.redact(once).text
    assert not redactor.find(once)


@FIVE_HUNDRED
@given(TEXTS)
def test_matches_are_sorted_and_apart_and_explain_the_redacted_text(text):
    """Replacing the spans of `find` by hand, from the last to the first, gives the text of `redact`."""
    matches, by_hand = REDACTOR.find(text), text

    for match in reversed(matches):
        by_hand = f"{by_hand[: match.start]}[{match.kind.upper()}]{by_hand[match.end :]}"

    assert all(match.start < match.end for match in matches)
    assert all(one.end <= next_.start for one, next_ in pairwise(matches))
    assert REDACTOR.redact(text).text == by_hand


@settings(max_examples=40, deadline=None)
@given(UNBROKEN, st.integers(90, 900))
def test_texts_without_any_delimiter_stream_like_others(text, size):
    """5,000 characters without a place to cut at: the same result, and never more than a bounded tail held back."""
    given_out, _ = streamed(REDACTOR, pieces_of(text, [size]))

    assert REDACTOR.redact(text).text == "".join(given_out)
    # The longest thing awaited is an e-mail address of 641 characters, each with 16 invisible ones behind it.
    assert len(given_out[-1]) <= 641 * 17


def test_ordinary_prose_is_held_back_by_a_word():
    """A reader sees each word as soon as the next space or comma has come, numbers one character later."""
    text = "Hello, this is a plain sentence: 7 plus 5 is 12 (in words, twelve) since 1999 or so, he said."
    stream, sent = StreamRedactor(REDACTOR), ""

    for end, character in enumerate(text, start=1):
        sent += stream.feed(character)
        held = text[len(sent) : end]
        assert len(held) <= 10
        assert held.strip(" ().,").count(" ") <= 2 if any(map(str.isdigit, held)) else " " not in held.strip()

    assert text == sent + stream.finish()


def test_a_text_that_may_become_an_entity_waits():
    """An unfinished address, number or key is not given out until something ends it."""
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


def test_a_key_of_any_length_is_replaced_as_soon_as_it_is_one():
    """The rest of a long key is dropped as it comes, however much, and what follows it is sent."""
    stream = StreamRedactor(REDACTOR)

    pieces = [
        stream.feed(piece)
        for piece in ["eyJhbGciOiJIUzI1NiJ9.", "a" * 5000, "." + "b" * 900, ".", "c\u200b", "\u200b9", ". so"]
    ]

    assert "[API_KEY]. so" == "".join(pieces) + stream.finish()
    assert "[API_KEY]" == "".join(pieces[:2])
    assert {PiiKind.API_KEY: 1} == stream.counts


def test_a_finished_stream_takes_no_more():
    """Its end is given out once; a piece after it is a mistake of the caller."""
    stream = StreamRedactor(REDACTOR)
    stream.feed("jane@example.com")

    assert ["[EMAIL]", ""] == [stream.finish(), stream.finish()]
    with pytest.raises(ValueError, match="finished"):
        stream.feed("x")


def test_only_the_configured_kinds_are_looked_for():
    """A kind that is switched off is left alone, even where all of them are."""
    text = "jane@example.com 415-555-2671 10.0.0.1"

    assert "[EMAIL] 415-555-2671 10.0.0.1" == Redactor([PiiKind.EMAIL]).redact(text).text
    assert "jane@example.com 415-555-2671 [IP]" == Redactor([PiiKind.IP]).redact(text).text
    assert text == Redactor([]).redact(text).text
    assert text == "".join(streamed(Redactor([]), text)[0])


def test_matches_are_offsets_of_the_original():
    """Look-alikes and invisible characters move nothing: the span is that of the text as it came."""
    text = "é ja\u200bne＠example.com\u200b!"

    assert [PiiMatch(PiiKind.EMAIL, 2, 19)] == REDACTOR.find(text)
    assert "ja\u200bne＠example.com" == text[2:19]


def test_the_fingerprint_names_the_policy():
    """Equal policies share cached answers, different ones never do; the order of the kinds is no difference."""
    assert Redactor([PiiKind.IP, PiiKind.EMAIL]).fingerprint == Redactor([PiiKind.EMAIL, PiiKind.IP]).fingerprint
    different = [Redactor(), Redactor([PiiKind.EMAIL]), Redactor([]), Redactor(phone_region="DE")]
    assert len(different) == len({redactor.fingerprint for redactor in different})


def test_an_unknown_policy_is_refused_at_once():
    """A misspelt region or kind would silently let numbers pass."""
    with pytest.raises(ValueError, match="unknown phone region 'us'"):
        Redactor(phone_region="us")
    with pytest.raises(ValueError, match="mail"):
        Redactor(["mail"])


def test_threads_may_share_a_redactor():
    """Eight threads at once find what one finds."""
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


def seconds_of(work):
    """Seconds of CPU: what else the machine does hardly counts."""
    before = time.thread_time()
    work()
    return time.thread_time() - before


def happens(measured, times=6):
    """Tell whether it is so in any of several tries: a machine may be slow now and then, a square is one every time."""
    return any(measured() for _ in range(times))


@pytest.mark.parametrize("attack", ATTACKS, ids=ascii)
def test_time_grows_with_the_length_and_not_with_its_square(attack):
    """Four times the text takes about four times as long (a square would be sixteen); a few milliseconds are noise."""
    short, long = (attack * 8000)[:8000], (attack * 32000)[:32000]

    assert happens(
        lambda: seconds_of(lambda: REDACTOR.redact(long)) < 7 * seconds_of(lambda: REDACTOR.redact(short)) + 0.005
    )
    assert happens(lambda: seconds_of(lambda: REDACTOR.redact(short)) < 2)


@pytest.mark.parametrize("attack", ATTACKS[:18], ids=ascii)
def test_a_stream_looks_at_a_bounded_tail(attack):
    """Fed in single characters, the next 700 cost about what the first did."""
    text = (attack * 700)[:700]

    def later_costs_no_more():
        stream = StreamRedactor(REDACTOR)
        first = seconds_of(lambda: [stream.feed(character) for character in text])
        later = seconds_of(lambda: [stream.feed(character) for character in text])
        return later < 3 * first + 0.02

    assert happens(later_costs_no_more)
