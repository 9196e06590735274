"""Which limit holds for a key."""

from app.access.limits import LimitSettings, configured, resolve
from app.config import QuotaConfig, RateLimitConfig
from app.types import Limits

DEFAULTS = Limits(monthly_tokens=1, requests_per_minute=10, burst=20, tokens_per_minute=3, parallel_requests=4)


def test_the_keys_own_word_wins_over_its_roles_and_that_over_the_configured():
    """None says nothing; 0 says that there is no limit."""
    key = LimitSettings(monthly_tokens=0)
    role = LimitSettings(monthly_tokens=50, parallel_requests=7)

    found = resolve(DEFAULTS, key, role)

    assert (0, 7, 3) == (found.monthly_tokens, found.parallel_requests, found.tokens_per_minute)


def test_a_lower_rate_brings_no_larger_burst_along():
    """Who sets a rate of one a minute does not mean twenty at once."""
    assert 1 == resolve(DEFAULTS, LimitSettings(requests_per_minute=1)).burst
    assert 5 == resolve(DEFAULTS, LimitSettings(requests_per_minute=1, burst=5)).burst
    assert 2 == resolve(DEFAULTS, LimitSettings(burst=2), LimitSettings(requests_per_minute=1)).burst


def test_without_any_word_the_configuration_holds():
    found = resolve(configured(RateLimitConfig(), QuotaConfig(monthly_tokens=9)))

    assert (9, 10, 10) == (found.monthly_tokens, found.requests_per_minute, found.burst)
