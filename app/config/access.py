"""What can be set about who may ask and how much.  Reads nothing."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr

from app.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class RateLimitConfig(Section):
    """What a key may ask in a short time, where its role and the key itself say nothing else; 0 is no limit."""

    enabled: bool = True
    """False switches off every rate limit, those of roles and keys too."""
    requests_per_minute: NonNegativeInt = 10
    """Requests that flow back into a token bucket in a minute."""
    burst_size: NonNegativeInt = 10
    """Requests of a full bucket, so many at once; 0 takes as many as flow back in a minute."""
    tokens_per_minute: NonNegativeInt = 100_000
    """Tokens of prompts and answers in a minute, and at once."""
    parallel_requests: NonNegativeInt = 0
    """Requests being answered at the same time."""


class QuotaConfig(Section):
    """Tokens in a calendar month, UTC."""

    monthly_tokens: NonNegativeInt = 0
    """For each key, where its role and the key itself say nothing else; 0 is no limit."""
    cached_prompt: Share = 0
    """How much an answer from the cache costs, as a share of its prompt's tokens."""
    cached_completion: Share = 0
    """And of its own."""
    on_outage: Literal["closed", "open"] = "closed"
    """While the database is down: closed refuses keys that have a quota with 503, open answers them uncounted."""
    lease_seconds: PositiveFloat = 60
    """What a dead process had reserved is free again after so long."""


class UsageLogConfig(Section):
    """The inference log: a row in the database for each answer."""

    enabled: bool = True
    """False writes no rows; tokens of the month are counted all the same."""
    flush_seconds: PositiveFloat = 1
    """Rows wait so long for each other; a crash loses no more."""
    max_waiting: PositiveInt = 10_000
    """Rows that may wait for a slow database; one more is dropped and counted."""
    retention_days: NonNegativeInt = 90
    """Older rows are deleted; 0 keeps them."""


class DatabaseConfig(Section):
    """Where keys, quotas and the log are kept."""

    url: SecretStr | None = None
    """postgresql://user:password@host/name, or sqlite:///file; a file in the data folder when unset."""
