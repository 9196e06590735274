"""How a key's limits come about: its own, else its role's, else the configured ones."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from app.config import QuotaConfig, RateLimitConfig
from app.types import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What a role or a key says about its limits: None leaves one to the next level, 0 is no limit."""

    monthly_tokens: int | None = None
    requests_per_minute: int | None = None
    burst: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None

    @classmethod
    def of(cls, row: Mapping[Any, Any], prefix: str = "") -> "LimitSettings":
        """Take the columns of these names from a row."""
        return cls(**{name: row[prefix + name] for name in LIMIT_NAMES})


NOTHING_SAID = LimitSettings()
LIMIT_NAMES = tuple(field.name for field in fields(LimitSettings))


def configured(rates: RateLimitConfig, quota: QuotaConfig) -> Limits:
    """Return the limits of a key for which nobody has said anything."""
    return Limits(
        monthly_tokens=quota.monthly_tokens,
        requests_per_minute=rates.requests_per_minute,
        burst=rates.burst_size,
        tokens_per_minute=rates.tokens_per_minute,
        parallel_requests=rates.parallel_requests,
    )


def resolve(defaults: Limits, *levels: LimitSettings) -> Limits:
    """Return what holds; the first level that says something wins.

    A level that sets only `requests_per_minute` means its bursts too: the default's could be far larger.
    """
    found: dict[str, int] = {}
    for level in levels:
        said = {name: value for name in LIMIT_NAMES if (value := getattr(level, name)) is not None}
        if "requests_per_minute" in said and "requests_per_minute" not in found:
            said.setdefault("burst", said["requests_per_minute"])
        found = said | found
    return Limits(**{name: found.get(name, getattr(defaults, name)) for name in LIMIT_NAMES})
