"""A stop string ends the text, wherever the pieces are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.stop_strings import StopBuffer

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Look at the whole text: the leftmost match, the shortest of those that begin together."""
    found = sorted((text.index(stop), len(stop), stop) for stop in stops if stop in text)
    return (text[: found[0][0]], found[0][2]) if found else (text, None)


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_every_cutting_shows_what_the_whole_text_would(text: str, stops: list[str], places: list[int]):
    """The pieces together are the text before the first stop string, and the buffer names it."""
    buffer = StopBuffer(stops)

    shown = "".join([buffer.feed(piece) for piece in cut(text, places)] + [buffer.finish()])

    assert reference(text, stops) == (shown, buffer.matched)


@given(TEXTS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]):
    """What is held back is the beginning of a stop string, and nothing is held back without need."""
    buffer = StopBuffer(stops)

    shown = "".join(buffer.feed(letter) for letter in text)

    held = text[len(shown) :]
    assert buffer.matched or not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", ""]),
        (["END"], ["E", "Nough"], ["", "ENough"]),
        (["\n\n"], ["a\n", "b"], ["a", "\nb"]),
        ([], ["any"], ["any"]),
    ],
    ids=["split over three pieces", "a false start is given back", "one newline waits", "no stop strings"],
)
def test_text_is_shown_as_early_as_it_can_be(stops: list[str], pieces: list[str], shown: list[str]):
    """Each piece lets out all but the part that may still be a stop string."""
    buffer = StopBuffer(stops)

    assert shown == [buffer.feed(piece) for piece in pieces]


def test_nothing_follows_a_match():
    """Text that comes after the stop string is never shown."""
    buffer = StopBuffer(["stop"])
    buffer.feed("a stop b")

    assert ("", "", "stop") == (buffer.feed("c"), buffer.finish(), buffer.matched)
