"""The five limits of a key, and where their values come from: the key, else its role, else the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.config import QuotaConfig, RateLimitConfig
from app.types import Limits


@dataclass(frozen=True, slots=True)
class LimitSpec:
    """One limit: everything else about it derives from this."""

    name: str
    """The name of the field, of the column in both tables, and of the command line's option."""
    unit: str
    section: str
    """The section of the configuration that has the default."""
    setting: str
    """The setting in that section."""
    help: str


LIMIT_SPECS = (
    LimitSpec("monthly_tokens", "tokens", "quota", "monthly_tokens", "Tokens in a calendar month, UTC"),
    LimitSpec("requests_per_minute", "requests/minute", "rate_limit", "requests_per_minute", "Requests a minute"),
    LimitSpec("burst", "requests", "rate_limit", "burst_size", "Requests at once"),
    LimitSpec("tokens_per_minute", "tokens/minute", "rate_limit", "tokens_per_minute", "Tokens a minute"),
    LimitSpec(
        "parallel_requests", "requests", "rate_limit", "parallel_requests", "Requests being answered at the same time"
    ),
)
LIMIT_NAMES = tuple(spec.name for spec in LIMIT_SPECS)


# A type checker needs fields by name, so they are written out here, in `types.Limits`, in the configuration's sections
# and in the bodies of web/admin; tests/unit/access/test_limits.py compares each of them with LIMIT_SPECS.
@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """A role's or a key's own limits: None leaves one to the next level, 0 is no limit."""

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


def configured(rates: RateLimitConfig, quota: QuotaConfig) -> Limits:
    """Return the limits of a key for which neither it nor its role says anything; those switched off are none."""
    sections = {"rate_limit": rates, "quota": quota}
    in_force = [spec for spec in LIMIT_SPECS if spec.section != "rate_limit" or rates.enabled]
    return Limits(**{spec.name: getattr(sections[spec.section], spec.setting) for spec in in_force})


def resolve(defaults: Limits, *levels: LimitSettings) -> Limits:
    """Return the limits in force; the first level that says something wins.

    A level that sets only `requests_per_minute` means its bursts too: the default's could be far larger.
    """
    found: dict[str, int] = {}
    for level in levels:
        said = {name: value for name in LIMIT_NAMES if (value := getattr(level, name)) is not None}
        if "requests_per_minute" in said and "requests_per_minute" not in found:
            said.setdefault("burst", said["requests_per_minute"])
        found = said | found
    return Limits(**{name: found.get(name, getattr(defaults, name)) for name in LIMIT_NAMES})
