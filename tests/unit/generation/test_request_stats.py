"""Tokens and latencies of one request, however many samples it has."""

from app.events import Delta, Started
from app.generation.request_stats import RequestStats
from app.telemetry import Metrics
from tests.unit.generation.services import complete


def figures(metrics: Metrics) -> dict[str, float]:
    """Return the counts and sums that a scrape shows for the model."""
    lines = metrics.render()[0].decode().splitlines()
    return {
        line.split("{")[0]: float(line.split()[-1])
        for line in lines
        if '{model="m"}' in line and "_created" not in line
    }


def test_one_request_waits_once_and_each_sample_has_its_inter_token_latencies():
    """The first token of all ends the wait; the prompt is counted once, the tokens of every sample."""
    metrics, samples = Metrics(["m"]), complete("x", n=2).samples()
    stats = RequestStats(metrics.model("m"), samples)

    samples[0].progress.cached = 3
    for index in (1, 0, 0, 1, 1):
        samples[index].progress.generated += 1
        stats.observe(Delta(text="a", tokens=1, index=index))
    stats.close(prompt_tokens=5)

    shown = figures(metrics)
    assert (1, 3) == (shown["time_to_first_token_seconds_count"], shown["inter_token_latency_seconds_count"])
    assert (5, 5) == (shown["prompt_tokens_total"], shown["tokens_generated_total"])
    assert 3 == shown["prompt_tokens_cached_total"]
    assert (5, 0) == (stats.generated, stats.replayed)
    assert stats.first_token_seconds is not None


def test_a_delta_of_several_tokens_has_one_latency():
    """The mean of theirs; one without tokens has none."""
    metrics, samples = Metrics(["m"]), complete("x").samples()
    stats = RequestStats(metrics.model("m"), samples)

    for tokens in (1, 3, 0):
        samples[0].progress.generated += tokens
        stats.observe(Delta(text="a", tokens=tokens))

    assert 1 == figures(metrics)["inter_token_latency_seconds_count"]


def test_what_was_generated_and_not_read_counts():
    """As after a hang-up: the model has done the work."""
    metrics, samples = Metrics(["m"]), complete("x").samples()
    stats = RequestStats(metrics.model("m"), samples)

    stats.observe(Started())
    samples[0].progress.generated = 7
    stats.close(prompt_tokens=5)

    assert 7 == stats.generated
    assert (5, 7) == (figures(metrics)["prompt_tokens_total"], figures(metrics)["tokens_generated_total"])


def test_what_comes_from_the_cache_is_no_work_of_the_model():
    """Neither waited for nor counted in its metrics, but in the replayed tokens."""
    metrics = Metrics(["m"])
    stats = RequestStats(metrics.model("m"), complete("x", n=2).samples())

    for index in (0, 1):
        stats.observe(Delta(text="a", tokens=2, index=index))
    stats.close(prompt_tokens=5)

    assert {0.0} == set(figures(metrics).values())
    assert (0, 4) == (stats.generated, stats.replayed)
    assert stats.first_token_seconds is not None


def test_each_sample_is_replayed_or_generated_by_itself():
    """Of three samples two are in the cache: their tokens are not the model's, whatever the third one's are."""
    metrics, samples = Metrics(["m"]), complete("x", n=3).samples()
    stats = RequestStats(metrics.model("m"), samples)

    for index in (0, 1, 2, 0, 1, 2):
        samples[2].progress.generated += index == 2
        stats.observe(Delta(text="a", tokens=1, index=index))
    stats.close(prompt_tokens=5)

    assert (2, 4) == (stats.generated, stats.replayed)
    assert 1 == figures(metrics)["inter_token_latency_seconds_count"]
