"""Which tokens belong to the text that was shown, however it was cut and held back."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from app.engine.base import Chunk
from app.engine.logprob_alignment import TokenSpans
from app.types import TokenLogprob

TEXTS = st.lists(st.text("abc", max_size=3), max_size=12)
STEPS = st.lists(st.integers(0, 7), max_size=30)


def token(number: int) -> TokenLogprob:
    return TokenLogprob(number, -1.0)


def fed(texts: Sequence[str]) -> TokenSpans:
    """Tokens 0, 1, ... with these texts."""
    spans = TokenSpans()
    for number, text in enumerate(texts):
        spans.add(text, token(number))
    return spans


def shown_numbers(spans: TokenSpans, characters: int) -> list[int]:
    return [each.token_id for each in spans.show(characters)[0]]


def test_a_token_is_shown_with_its_last_character():
    """Not while a part of it is held back."""
    spans = fed(["ab", "cd"])

    assert [[], [0], [], [1]] == [shown_numbers(spans, 1) for _ in range(4)]


def test_a_token_that_is_cut_off_is_never_shown():
    """Nor are those behind it."""
    spans = fed(["ab", "cd", "ef"])

    assert [0] == shown_numbers(spans, 3)
    spans.finish()
    assert [] == shown_numbers(spans, 0)


def test_a_token_without_text_goes_with_the_text_behind_it():
    """Two bytes of one character are shown with the character, and both of them."""
    spans = fed(["a", "", "é"])

    assert [[0], [1, 2]] == [shown_numbers(spans, 1) for _ in range(2)]


def test_a_last_token_without_text_goes_with_the_end_of_the_answer():
    """With what the decoder still had of it, or with nothing."""
    spans, silent = fed(["a", ""]), fed(["a", ""])
    assert [0] == shown_numbers(spans, 1) == shown_numbers(silent, 1)

    spans.finish("\ufffd")
    silent.finish()

    assert [[], [1]] == [shown_numbers(spans, count) for count in (0, 1)]
    assert [1] == shown_numbers(silent, 0)


def test_text_without_a_log_probability_takes_its_place():
    """None stands for a token that the caller did not ask about."""
    spans = TokenSpans()
    spans.add("abc", None)
    spans.add("d", token(1))

    assert [[], [1]] == [shown_numbers(spans, count) for count in (3, 1)]


@given(TEXTS, STEPS)
def test_each_token_is_shown_once_in_order_where_it_ends(texts: list[str], steps: list[int]):
    """Whatever the steps: the places told are those where the tokens' texts end, and all come in the end."""
    spans, whole = fed(texts), "".join(texts)
    spans.finish()
    seen: list[TokenLogprob] = []
    ends: list[int] = []
    at = 0
    for step in [*steps, len(whole)]:
        step = min(step, len(whole) - at)
        tokens, places = spans.show(step)
        assert all(0 <= place <= step for place in places)
        seen += tokens
        ends += [at + place for place in places]
        at += step

    assert list(map(token, range(len(texts)))) == seen
    assert sorted(ends) == ends
    assert all(end >= len("".join(texts[: number + 1])) for number, end in enumerate(ends))


@given(TEXTS, STEPS, STEPS)
def test_following_the_pieces_of_another_shows_the_same_tokens(texts: list[str], cuts: list[int], steps: list[int]):
    """A filter behind the engine counts on, whatever pieces it was given and whatever it holds back itself."""
    first, second, direct, whole = fed(texts), TokenSpans(), fed(texts), "".join(texts)
    first.finish(), direct.finish()
    at = 0
    for cut in [*cuts, len(whole), 0]:
        piece = whole[at : at + cut]
        at += len(piece)
        tokens, ends = first.show(len(piece))
        second.follow(Chunk(text=piece, logprobs=tokens, token_ends=ends))

    for step in [*steps, len(whole)]:
        assert direct.show(step) == second.show(step)
