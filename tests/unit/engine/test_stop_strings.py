"""A stop string ends the text, wherever the deltas are cut."""

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
    """Look at the whole text: the leftmost match, the shortest of those that begin at one place."""
    found = sorted((text.index(stop), len(stop), stop) for stop in stops if stop in text)
    return (text[: found[0][0]], found[0][2]) if found else (text, None)


@given(TEXTS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_every_cutting_shows_what_the_whole_text_would(text: str, stops: list[str], places: list[int]):
    """The deltas together are the text before the first stop string, and the buffer names it."""
    buffer = StopBuffer(stops)

    shown = "".join([buffer.feed(delta) for delta in cut(text, places)] + [buffer.finish()])

    assert reference(text, stops) == (shown, buffer.matched)


@given(TEXTS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]):
    """What is withheld is the beginning of a stop string, and nothing is withheld without need."""
    buffer = StopBuffer(stops)

    shown = "".join(buffer.feed(letter) for letter in text)

    withheld = text[len(shown) :]
    assert buffer.matched or not withheld or any(stop.startswith(withheld) and stop != withheld for stop in stops)


@pytest.mark.parametrize(
    ("stops", "deltas", "shown"),
    [
        (["END"], ["one E", "N", "D two"], ["one ", "", ""]),
        (["END"], ["E", "Nough"], ["", "ENough"]),
        (["\n\n"], ["a\n", "b"], ["a", "\nb"]),
        ([], ["any"], ["any"]),
    ],
    ids=["split over three deltas", "a false start is given back", "one newline waits", "no stop strings"],
)
def test_text_is_shown_as_early_as_it_can_be(stops: list[str], deltas: list[str], shown: list[str]):
    """Each delta releases all but the part that may still be a stop string."""
    buffer = StopBuffer(stops)

    assert shown == [buffer.feed(delta) for delta in deltas]


def test_nothing_follows_a_match():
    """Text that comes after the stop string is never shown."""
    buffer = StopBuffer(["stop"])
    buffer.feed("a stop b")

    assert ("", "", "stop") == (buffer.feed("c"), buffer.finish(), buffer.matched)
