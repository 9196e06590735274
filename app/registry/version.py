"""What is known of one version of a registered model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ENTRIES = 100
"""Metrics, and tags, that are reported."""
MAX_KEY_CHARS, MAX_VALUE_CHARS = 250, 500
RESERVED = "mlflow."
"""Prefix of the tags that MLflow itself sets: users, paths and commands of whoever trained the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version of a registered model, as the registry described it when it was looked up."""

    name: str
    version: str
    alias: str | None = None
    """The alias by which it was found; it may point elsewhere by now."""
    stage: str | None = None
    run_id: str | None = None
    """The run that logged it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric of that run."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Those that people gave the version."""
    digest: str | None = None
    """Of its files, once they are here: SHA-256 of the lines that `sha256sum *` prints, sorted by name."""

    def as_dict(self) -> dict[str, Any]:
        """Return all facts as plain values."""
        return {
            "name": self.name,
            "version": self.version,
            "alias": self.alias,
            "stage": self.stage,
            "run_id": self.run_id,
            "metrics": dict(self.metrics),
            "tags": dict(self.tags),
            "digest": self.digest,
        }


def reported_metrics(metrics: Iterable[tuple[str, float | str]]) -> dict[str, float]:
    """Return the metrics that are numbers, at most a hundred; MLflow writes a NaN as a text."""
    numbers = {
        _printable(key, MAX_KEY_CHARS): float(value)
        for key, value in metrics
        if not isinstance(value, str) and math.isfinite(value)
    }
    return dict(sorted(numbers.items())[:MAX_ENTRIES])


def reported_tags(tags: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the tags that people gave, at most a hundred."""
    own = {
        _printable(key, MAX_KEY_CHARS): _printable(value, MAX_VALUE_CHARS)
        for key, value in tags
        if not key.startswith(RESERVED)
    }
    return dict(sorted(own.items())[:MAX_ENTRIES])


def _printable(text: str, limit: int) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text[:limit])
