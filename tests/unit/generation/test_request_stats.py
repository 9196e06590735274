"""Figures of one ask, however many answers it has."""

import pytest

from app.engine.base import Chunk
from app.generation.request_stats import Meter
from app.generation.requests import Ending
from app.telemetry import Metrics
from app.types import FinishReason, Usage

LAST = Chunk(finish_reason=FinishReason.STOP, usage=Usage(5, 2, cached_tokens=3))


def figures(metrics: Metrics) -> dict[str, float]:
    """The counts and sums that a scrape shows for the model."""
    lines = metrics.render()[0].decode().splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if '{model="m"}' in line}


def test_one_request_waits_once_and_each_answer_has_its_gaps():
    """The first token of all ends the wait; the prompt is counted once, the tokens of every answer."""
    metrics = Metrics(["m"])
    meter = Meter("m", metrics, answers=2)

    for index in (1, 0, 0, 1, 1):
        meter.see(index, Chunk(text="a", tokens=1))
    meter.settle(prompt_tokens=5)

    shown = figures(metrics)
    assert (1, 3) == (shown["time_to_first_token_seconds_count"], shown["inter_token_latency_seconds_count"])
    assert (5, 5) == (shown["prompt_tokens_total"], shown["tokens_generated_total"])


def test_what_comes_from_the_cache_is_no_work_of_the_model():
    """Neither waited for nor counted."""
    metrics = Metrics(["m"])
    meter = Meter("m", metrics, answers=2)

    for index in (0, 1):
        meter.see(index, Chunk(text="a", tokens=1, cached=True))
    meter.settle(prompt_tokens=5)

    assert {} == figures(metrics)


def test_the_end_tells_of_each_answer_and_of_all_together():
    """Cached prompt tokens are those of the first, which the others share."""
    meter = Meter("m", Metrics(["m"]), answers=2)
    meter.see(0, LAST)
    length = Chunk(finish_reason=FinishReason.LENGTH, usage=Usage(5, 7, cached_tokens=5), cached=True)
    meter.see(1, length)

    finished = meter.finished()

    endings = (Ending(finish_reason=FinishReason.STOP, tokens=2), Ending(finish_reason=FinishReason.LENGTH, tokens=7))
    assert (endings, Usage(5, 9, cached_tokens=3), False) == (finished.endings, finished.usage, finished.cached)
    assert FinishReason.STOP == finished.finish_reason


def test_an_answer_that_never_ended_is_a_defect():
    """Even if the other one did."""
    meter = Meter("m", Metrics(["m"]), answers=2)
    meter.see(0, LAST)

    with pytest.raises(RuntimeError, match="last chunk"):
        meter.finished()
