"""The content of a scrape, and that it stays short whatever clients send."""

import asyncio
import random
import re
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.requests import Times
from app.telemetry import Metrics
from app.telemetry.metrics import MAX_ENDPOINTS, METHODS, STATUSES
from app.telemetry.model_figures import ModelFigures
from tests.examples import examples


def figures(metrics: Metrics) -> dict[str, float]:
    """Return every series by its name and labels, without the `_created` ones."""
    lines = [line.rsplit(" ", 1) for line in metrics.render()[0].decode().split("\n") if line and line[0] != "#"]
    return {name: float(value) for name, value in lines if "_created" not in name}


def test_every_method_changes_its_own_series() -> None:
    """Under the names that dashboards use."""
    metrics = Metrics(["m"])

    metrics.http_done("POST", "/v1/generate", 200, 0.02)
    model = metrics.model("m")
    model.first_token(0.05)
    model.token_gap(0.01)
    model.step(0.02)
    model.generated(prompt_tokens=7, completion_tokens=3, cached_tokens=2)
    model.cache_hit()
    model.cache_miss()
    metrics.pii("email", "input", 2)
    metrics.turn_stored()
    metrics.limit_reached("requests")
    metrics.limit_reached("quota")
    metrics.auth_failed()
    metrics.watch(
        models=lambda: [
            ModelFigures(
                model="m", ready=True, running=4, waiting=5, restarts=2, rows=8, device_bytes=8, worker_bytes=9
            )
        ],
        sessions=lambda: 6,
        model_loaded=lambda: 1,
    )
    metrics.http_done("GET", "/status", 401, 0.04, "unauthorized")
    scraped = figures(metrics)

    assert {
        'http_requests_total{endpoint="/v1/generate",method="POST",status="200"}': 1,
        'http_request_duration_seconds_count{endpoint="/v1/generate",method="POST"}': 1,
        'http_request_duration_seconds_bucket{endpoint="/v1/generate",le="0.025",method="POST"}': 1,
        'http_request_duration_seconds_bucket{endpoint="/v1/generate",le="0.01",method="POST"}': 0,
        'time_to_first_token_seconds_sum{model="m"}': 0.05,
        'inter_token_latency_seconds_sum{model="m"}': 0.01,
        'prompt_tokens_total{model="m"}': 7,
        'tokens_generated_total{model="m"}': 3,
        'pii_matches_total{direction="input",kind="email"}': 2,
        'model_step_seconds_count{model="m"}': 1,
        'cache_hits_total{model="m"}': 1,
        'cache_misses_total{model="m"}': 1,
        'limit_refusals_total{limit="requests"}': 1,
        'limit_refusals_total{limit="quota"}': 1,
        "session_turns_total": 1,
        "rate_limited_total": 1,
        "auth_failures_total": 1,
        "requests_running": 4,
        "requests_waiting": 5,
        "sessions": 6,
        "model_loaded": 1,
        'engine_restarts_total{model="m"}': 2,
        'kv_rows{model="m"}': 8,
        'kv_rows_used{model="m"}': 4,
        'model_ready{model="m"}': 1,
        'worker_memory_bytes{model="m"}': 9,
        "gpu_memory_usage_bytes": 8,
        "api_requests_total": 2,
        "api_request_duration_seconds": 0.03,
        "tokens_per_second": 3 / 60,
        'errors_total{error="unauthorized"}': 1,
    }.items() <= scraped.items()


def test_watched_figures_are_read_at_each_scrape() -> None:
    """They are never stale."""
    metrics, sessions = Metrics([]), iter([1, 2])
    metrics.watch(
        models=lambda: (),
        sessions=lambda: next(sessions),
        model_loaded=float,
    )

    assert [1, 2] == [figures(metrics)["sessions"] for _ in range(2)]


def test_two_applications_do_not_share_their_metrics() -> None:
    """Each has a registry of its own."""
    first, second = Metrics([]), Metrics([])

    first.turn_stored()

    assert (1, 0) == (figures(first)["session_turns_total"], figures(second)["session_turns_total"])


@given(st.integers(0, 1000), st.text(), st.text())
@examples(20)
def test_no_method_path_or_status_can_make_more_series_than_their_bound(seed: int, method: str, path: str) -> None:
    """Raw paths given by mistake among them: so many pairs, so many statuses each, whatever comes."""
    metrics, draw = Metrics([]), random.Random(seed)
    for number in range(2000):
        one = draw.choice([method, "BREW", *METHODS])
        metrics.http_done(one, draw.choice([path, f"/{number}", None]), draw.randrange(1000), 0.001)
    names = [name for name in figures(metrics) if name.startswith("http_")]
    pairs = {re.sub(r",?(status|le)=\"[^\"]*\"", "", name.partition("{")[2]) for name in names}

    assert len(pairs) <= MAX_ENDPOINTS + 1
    assert {each for name in names for each in re.findall('status="(.*?)"', name)} <= {*map(str, STATUSES), "OTHER"}
    assert {each for name in names for each in re.findall('method="(.*?)"', name)} <= {*METHODS, "OTHER"}


@pytest.mark.parametrize("raw_paths", [False, True], ids=["unmatched routes", "raw paths given by mistake"])
def test_random_requests_do_not_create_series_without_bound(raw_paths: bool) -> None:
    """10,000 methods, paths and models: one series, or as many templates as there may be."""
    metrics, draw = Metrics(["m"]), random.Random(1)
    metrics.http_done("GET", "/health", 200, 0.001)
    metrics.model("other").generated(1, 1)
    before = len(figures(metrics))

    for _ in range(10_000):
        word = "".join(draw.choices(string.ascii_letters, k=8))
        metrics.http_done(word, f"/{word}" if raw_paths else None, 404, 0.001)
        metrics.model(word).generated(1, 1)
        metrics.model(word).first_token(0.1)
        metrics.model(word).token_gap(0.1)
    scraped = figures(metrics)

    assert 1 == len(scraped) - before
    assert 10_001 == scraped['tokens_generated_total{model="OTHER"}']


def test_a_model_that_could_not_be_loaded_leaves_no_series() -> None:
    """Whatever was counted for it, in every family; the other models keep theirs."""
    metrics = Metrics(["m"])
    metrics.model("m").generated(1, 1)
    before = figures(metrics)

    for number in range(20):
        metrics.add_model(f"failed-{number}")
        metrics.model(f"failed-{number}").sample_done("stop", 3, Times())
        metrics.model(f"failed-{number}").rejected("queue_full")
        metrics.forget_model(f"failed-{number}")
    after = figures(metrics)
    metrics.model("failed-1").generated(2, 2)

    assert before.keys() == after.keys()
    assert 2 == figures(metrics)['tokens_generated_total{model="OTHER"}']


def test_a_scrape_has_the_content_type_of_prometheus() -> None:
    """Prometheus chooses its parser by it."""
    assert Metrics([]).render()[1].startswith("text/plain; version=")


async def test_a_blocked_event_loop_shows() -> None:
    """The time that the loop was blocked is in the histogram."""
    metrics = Metrics([])
    watch = asyncio.create_task(metrics.watch_event_loop(0.01))
    await asyncio.sleep(0.03)

    time.sleep(0.12)  # noqa: ASYNC251 - what the metric is there to show
    await asyncio.sleep(0.03)
    watch.cancel()
    scraped = figures(metrics)

    assert scraped['event_loop_lag_seconds_bucket{le="+Inf"}'] - scraped['event_loop_lag_seconds_bucket{le="0.1"}'] >= 1
    assert scraped["event_loop_lag_seconds_count"] >= 3
