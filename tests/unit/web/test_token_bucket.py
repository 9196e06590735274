"""The token bucket: what it promises for every sequence of requests, and under threads."""

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, storage_from_string
from limits.strategies import STRATEGIES

from app.web.http.rate_limits import FailedKeyLimiter
from app.web.http.token_bucket import STORAGE_URI, STRATEGY, BucketLimit, BucketStorage, TokenBucketRateLimiter


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def bucket(clock: Clock) -> TokenBucketRateLimiter:
    return TokenBucketRateLimiter(BucketStorage(clock=clock))


@given(
    burst=st.integers(1, 20),
    per_minute=st.integers(1, 600),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 3)), max_size=80),
)
@settings(deadline=None)
def test_never_more_than_the_burst_and_the_rate_together(burst, per_minute, steps):
    """In any window of any length t, at most burst + rate * t is granted."""
    clock = Clock()
    strategy, limit = bucket(clock), BucketLimit(burst=burst, per_minute=per_minute, namespace="n")
    granted: list[tuple[float, int]] = []
    for pause, cost in steps:
        clock.now += pause
        if strategy.hit(limit, "owner", cost=cost):
            granted.append((clock.now, cost))

    for first in range(len(granted)):
        total = 0
        for moment, cost in granted[first:]:
            total += cost
            assert total <= burst + (moment - granted[first][0]) * per_minute / 60 + 1e-6


@given(burst=st.integers(1, 20), per_minute=st.integers(1, 600), pauses=st.lists(st.floats(0, 30), max_size=60))
@settings(deadline=None)
def test_who_waits_as_told_is_granted_and_who_is_refused_has_lost_nothing(burst, per_minute, pauses):
    """A refusal names the wait, changes nothing, and the same attempt succeeds after that wait."""
    clock = Clock()
    strategy, limit = bucket(clock), BucketLimit(burst=burst, per_minute=per_minute, namespace="n")
    for pause in pauses:
        clock.now += pause
        before = strategy.take(limit, "owner", cost=0)
        taken = strategy.take(limit, "owner")
        assert 0 <= taken.remaining <= burst
        if taken.granted:
            assert 0 == taken.retry_in
            assert before.remaining - 1 == taken.remaining
        else:
            assert before == strategy.take(limit, "owner", cost=0)
            clock.now += taken.retry_in + 1e-6
            assert strategy.take(limit, "owner").granted


def test_a_full_bucket_gives_its_burst_and_then_its_rate():
    clock = Clock()
    strategy, limit = bucket(clock), BucketLimit(burst=3, per_minute=6, namespace="n")

    assert [True, True, True, False] == [strategy.hit(limit, "owner") for _ in range(4)]
    refused = strategy.take(limit, "owner")
    assert (0, 30.0, 10.0) == (refused.remaining, refused.full_in, refused.retry_in)
    clock.now += 10
    assert [True, False] == [strategy.hit(limit, "owner") for _ in range(2)]
    clock.now += 1000
    assert [True, True, True, False] == [strategy.hit(limit, "owner") for _ in range(4)]


def test_threads_get_exactly_the_burst():
    """Whatever the interleaving, no token is given twice and none is lost."""
    strategy, limit = bucket(Clock()), BucketLimit(burst=500, per_minute=1, namespace="n")

    with ThreadPoolExecutor(16) as pool:
        granted = list(pool.map(lambda _: strategy.hit(limit, "owner"), range(2000)))

    assert 500 == sum(granted)


def test_owners_and_purposes_do_not_share():
    strategy = bucket(Clock())
    one = BucketLimit(burst=1, per_minute=1, namespace="one")
    other = BucketLimit(burst=1, per_minute=1, namespace="other")

    assert strategy.hit(one, "a")
    assert strategy.hit(one, "b")
    assert strategy.hit(other, "a")
    assert not strategy.hit(one, "a")


def test_looking_takes_nothing():
    strategy, limit = bucket(Clock()), BucketLimit(burst=2, per_minute=60, namespace="n")

    assert all(strategy.test(limit, "owner", cost=2) for _ in range(5))
    assert not strategy.test(limit, "owner", cost=3)
    strategy.hit(limit, "owner")
    stats = strategy.get_window_stats(limit, "owner")
    assert 1 == stats.remaining
    assert math.isclose(stats.reset_time, time.time() + 1, abs_tol=0.5)


def test_clearing_and_resetting_fill_the_bucket():
    strategy, limit = bucket(Clock()), BucketLimit(burst=1, per_minute=1, namespace="n")
    for empty in (lambda: strategy.clear(limit, "owner"), strategy.storage.reset):
        assert strategy.hit(limit, "owner")
        assert not strategy.hit(limit, "owner")
        empty()


def test_memory_is_bounded_and_the_least_used_goes_first():
    storage = BucketStorage(clock=Clock(), max_buckets=10)
    strategy, limit = TokenBucketRateLimiter(storage), BucketLimit(burst=5, per_minute=0.06, namespace="n")
    for number in range(100):
        strategy.hit(limit, "regular")
        strategy.hit(limit, f"passer-by {number}")

    assert 10 == len(storage.buckets)
    assert not strategy.hit(limit, "regular")


def test_it_stands_beside_the_librarys_own_strategies():
    strategies: Mapping[str, object] = STRATEGIES
    assert TokenBucketRateLimiter is strategies[STRATEGY]
    assert isinstance(storage_from_string(STORAGE_URI), BucketStorage)


def test_another_storage_or_limit_is_refused():
    with pytest.raises(TypeError, match="MemoryStorage"):
        TokenBucketRateLimiter(MemoryStorage())
    with pytest.raises(TypeError):
        bucket(Clock()).hit(RateLimitItemPerMinute(1), "owner")


def test_settings_are_not_read_from_the_working_directory(tmp_path, monkeypatch):
    """slowapi would take RATELIMIT_* from any .env it finds, and the service's own secrets with them."""
    (tmp_path / ".env").write_text("RATELIMIT_ENABLED=false\nSECURITY__API_KEY=canary-in-the-file\n")
    monkeypatch.chdir(tmp_path)

    limits = FailedKeyLimiter(20, on_refusal=lambda limit: None)

    assert {} == limits.limiter.app_config.file_values
