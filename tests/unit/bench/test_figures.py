"""From the times of answers to figures."""

import math

import pytest

from bench.figures import Figures, Measured, percentile
from bench.wire import TimedResponse


def response(began: float, *arrivals: float, tokens: int) -> TimedResponse:
    return TimedResponse(began=began, ended=arrivals[-1], arrivals=list(arrivals), completion_tokens=tokens)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.95, 4.0), (0.25, 1.0), (0.26, 2.0), (0, 1.0)])
def test_a_percentile_is_one_of_the_values(share, expected):
    """The smallest that so many values do not exceed, in whatever order they come."""
    assert expected == percentile([4.0, 1.0, 3.0, 2.0], share)


def test_a_percentile_of_nothing_is_no_number():
    """A server that sends its answer in one piece has no time between two."""
    assert math.isnan(percentile([], 0.5))


def test_a_round_counts_all_tokens_over_the_time_of_all_its_answers():
    """From the first request to the last answer, not the sum of the clients' times."""
    answers = [response(0.0, 0.5, 0.75, 2.0, tokens=30), response(1.0, 2.0, 4.0, tokens=10)]

    figures = Figures.of(answers, client_seconds=0.1, server_seconds=1.9)

    assert 10.0 == figures.tokens_per_second
    assert (500.0, 1000.0) == (figures.first_token_p50_ms, figures.first_token_p95_ms)
    assert (1250.0, 2000.0) == (figures.between_p50_ms, figures.between_p95_ms)
    assert 0.05 == pytest.approx(figures.client_share)


def test_the_median_is_taken_of_each_figure_on_its_own():
    """One disturbed round does not move it."""
    rounds = [Figures(10, 1, 2, 3, 4, 0.1), Figures(12, 9, 9, 9, 9, 0.9), Figures(11, 2, 3, 4, 5, 0.2)]

    assert Figures(11, 2, 3, 4, 5, 0.2) == Figures.median(rounds)


def test_a_load_that_failed_has_no_figures():
    """Not even those of the rounds before the failure: they would not compare with the others' three."""
    assert Measured("c1", "serve", [Figures(10, 1, 2, 3, 4, 0.1)], failure="HTTP 500").median is None
