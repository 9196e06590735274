"""Decide which growth of a process over a long run is a leak.  Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MEGABYTE = 1_000_000
WARM_SHARE = 0.25
"""Of the samples that are not judged: pools, caches and sessions fill up first."""
RSS_MEGABYTES, RSS_SHARE = 12, 0.02
"""How much resident memory may grow, whichever is more: allocators give back late."""
FEWEST = 4
"""Samples that a verdict needs."""
FDS, THREADS = 2, 1
"""How many more may be open at the end; a leak of one for each hundred requests would show."""


@dataclass(frozen=True)
class Sample:
    """What one process holds while no request is running."""

    rss_bytes: int
    fds: int
    threads: int

    def __str__(self) -> str:
        return f"{self.rss_bytes / MEGABYTE:.1f} MB, {self.fds} fds, {self.threads} threads"


def growth(samples: Sequence[Sample]) -> list[str]:
    """Return what grew too much from the first samples after warming up to the last ones, in words.

    Raises: ValueError: there are fewer than `FEWEST` samples.
    """
    if len(samples) < FEWEST:
        raise ValueError(f"fewer than {FEWEST} samples")
    judged = samples[max(1, round(WARM_SHARE * len(samples))) :]
    third = max(1, len(judged) // 3)
    early, late = judged[:third], judged[-third:]

    def middle(some: Sequence[Sample], name: str) -> float:
        return float(statistics.median(getattr(sample, name) for sample in some))

    limits = {
        "rss_bytes": max(RSS_MEGABYTES * MEGABYTE, RSS_SHARE * middle(early, "rss_bytes")),
        "fds": FDS,
        "threads": THREADS,
    }
    grown = {name: middle(late, name) - middle(early, name) for name in limits}
    return [
        f"{name} grew by {grown[name]:.0f}, allowed {limits[name]:.0f}" for name in limits if grown[name] > limits[name]
    ]
