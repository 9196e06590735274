"""Which tokens belong to the text that is released, however it is cut and withheld."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from app.engine.logprob_alignment import DeltaAlignment, LogprobAlignment
from app.events import Delta, DetokenizedLogprob

TEXTS = st.lists(st.text("abc", max_size=3), max_size=12)
STEPS = st.lists(st.integers(0, 7), max_size=30)


def token(number: int) -> DetokenizedLogprob:
    """A token that differs by its number, whatever its text."""
    return DetokenizedLogprob(text="", raw=b"", logprob=-float(number))


def fill(alignment: LogprobAlignment[DetokenizedLogprob], texts: Sequence[str]) -> None:
    """Add tokens 0, 1, ... with these texts."""
    for number, text in enumerate(texts):
        alignment.add(text, token(number))


def aligned(texts: Sequence[str]) -> LogprobAlignment[DetokenizedLogprob]:
    alignment = LogprobAlignment[DetokenizedLogprob]()
    fill(alignment, texts)
    return alignment


def released(alignment: LogprobAlignment[DetokenizedLogprob], characters: int) -> list[int]:
    return [-int(each.logprob) for each in alignment.release(characters)[0]]


def test_a_token_is_released_with_its_last_character():
    """Not while a part of it is withheld."""
    alignment = aligned(["ab", "cd"])

    assert [[], [0], [], [1]] == [released(alignment, 1) for _ in range(4)]


def test_a_token_that_is_cut_off_is_never_released():
    """Nor are those behind it."""
    alignment = aligned(["ab", "cd", "ef"])

    assert [0] == released(alignment, 3)
    alignment.finish()
    assert [] == released(alignment, 0)


def test_a_token_without_text_is_released_with_the_text_behind_it():
    """Two bytes of one character come with the character, and both of them."""
    alignment = aligned(["a", "", "é"])

    assert [[0], [1, 2]] == [released(alignment, 1) for _ in range(2)]


def test_a_last_token_without_text_is_released_with_the_end_of_the_sample():
    """With what the decoder still had of it, or with nothing."""
    broken, silent = aligned(["a", ""]), aligned(["a", ""])
    assert [0] == released(broken, 1) == released(silent, 1)

    broken.finish("\ufffd")
    silent.finish()

    assert [[], [1]] == [released(broken, count) for count in (0, 1)]
    assert [1] == released(silent, 0)


def test_text_without_a_log_probability_takes_its_place():
    """None stands for a token whose log-probability the caller does not want."""
    alignment = LogprobAlignment[DetokenizedLogprob]()
    alignment.add("abc", None)
    alignment.add("d", token(1))

    assert [[], [1]] == [released(alignment, count) for count in (3, 1)]


@given(TEXTS, STEPS)
def test_each_token_is_released_once_in_order_where_it_ends(texts: list[str], steps: list[int]):
    """Whatever the steps: the places are those where the tokens' texts end, and all come in the end."""
    alignment, whole = aligned(texts), "".join(texts)
    alignment.finish()
    seen: list[DetokenizedLogprob] = []
    ends: list[int] = []
    at = 0
    for step in [*steps, len(whole)]:
        step = min(step, len(whole) - at)
        tokens, places = alignment.release(step)
        assert all(0 <= place <= step for place in places)
        seen += tokens
        ends += [at + place for place in places]
        at += step

    assert list(map(token, range(len(texts)))) == seen
    assert sorted(ends) == ends
    assert all(end >= len("".join(texts[: number + 1])) for number, end in enumerate(ends))


@given(TEXTS, STEPS, STEPS)
def test_following_the_deltas_of_another_releases_the_same_tokens(texts: list[str], cuts: list[int], steps: list[int]):
    """A filter behind the engine counts on, whatever deltas it was given and whatever it withholds itself."""
    first, second, direct, whole = aligned(texts), DeltaAlignment(), aligned(texts), "".join(texts)
    first.finish()
    direct.finish()
    at = 0
    for cut in [*cuts, len(whole), 0]:
        text = whole[at : at + cut]
        at += len(text)
        tokens, ends = first.release(len(text))
        second.follow(Delta(text=text, logprobs=tokens, token_ends=ends))

    for step in [*steps, len(whole)]:
        assert direct.release(step) == second.release(step)
