"""Defines the settings of rate limits, quotas, the inference log and the database."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr

from app.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class RateLimitConfig(Section):
    """Default rate limits of a key, which its role and the key itself may override; 0 is unlimited."""

    enabled: bool = True
    """False disables these defaults; the limits that a role or a key sets itself stay in force."""
    requests_per_minute: NonNegativeInt = 60
    """Refill rate of the token bucket, in requests."""
    burst_size: NonNegativeInt = 60
    """Capacity of the token bucket in requests; 0 is the refill of one minute."""
    tokens_per_minute: NonNegativeInt = 100_000
    """Prompt and completion tokens: both the refill of a minute and the capacity of the bucket."""
    parallel_requests: NonNegativeInt = 0
    """Concurrent requests."""
    on_outage: Literal["share", "closed"] = "share"
    """While Redis is away: share lets each process grant its part of the limits, closed refuses requests (503)."""
    per_process: bool = False
    """Acknowledges that several processes without Redis each grant the whole limits."""


class QuotaConfig(Section):
    """Token quotas per calendar month, UTC."""

    monthly_tokens: NonNegativeInt = 0
    """Default quota of a key, which its role and the key itself may override; 0 is unlimited."""
    cached_prompt: Share = 0
    """Share of the prompt tokens that a cached response is charged."""
    cached_completion: Share = 0
    """Share of the completion tokens that a cached response is charged."""
    on_outage: Literal["closed", "open"] = "closed"
    """While the database is down: closed refuses keys with a quota (503), open serves them without counting."""
    lease_seconds: PositiveFloat = 60
    """Time after which the reservations of a dead process expire."""


class UsageLogConfig(Section):
    """The inference log: one database row per request."""

    enabled: bool = True
    """False writes no rows; monthly tokens are counted all the same."""
    flush_seconds: PositiveFloat = 1
    """Interval at which rows are written; a crash loses at most these."""
    max_waiting: PositiveInt = 10_000
    """Rows that may wait for a slow database; beyond that the oldest is dropped and counted."""
    retention_days: NonNegativeInt = 90
    """Older rows are deleted; 0 never deletes."""


class DatabaseConfig(Section):
    """The database of keys, quotas and logs."""

    url: SecretStr | None = None
    """postgresql://user:password@host/name, or sqlite:///file; a file in the data folder when unset."""
