"""From responses to figures: one round of a load on a server, and the median of rounds.  Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.wire import TimedResponse


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Figures:
    """What one round showed, or the medians of several."""

    tokens_per_second: float
    """New tokens of all clients, from the first request to the last response."""
    first_token_p50_ms: float
    first_token_p95_ms: float
    between_p50_ms: float
    """Inter-token latency: from each event with text to the next."""
    between_p95_ms: float
    client_share: float
    """Of the processor time that client and server took together."""

    @classmethod
    def of(cls, responses: Sequence[TimedResponse], client_seconds: float, server_seconds: float) -> "Figures":
        """Reduce the responses of one round."""
        seconds = max(response.ended for response in responses) - min(response.began for response in responses)
        first = [1000 * response.first_token for response in responses]
        between = [1000 * gap for response in responses for gap in response.gaps]
        return cls(
            tokens_per_second=sum(response.completion_tokens for response in responses) / seconds,
            first_token_p50_ms=percentile(first, 0.5),
            first_token_p95_ms=percentile(first, 0.95),
            between_p50_ms=percentile(between, 0.5),
            between_p95_ms=percentile(between, 0.95),
            client_share=client_seconds / ((client_seconds + server_seconds) or math.inf),
        )

    @classmethod
    def median(cls, rounds: Sequence["Figures"]) -> "Figures":
        """Return the median of each figure on its own."""
        return cls(*(statistics.median(getattr(each, field.name) for each in rounds) for field in fields(cls)))


@dataclass(frozen=True)
class Measured:
    """All rounds of one load on one server."""

    load: str
    peer: str
    rounds: Sequence[Figures]
    turns_ms: Sequence[Sequence[float]] = ()
    """Of a conversation: the time to the first token of each turn, by round."""
    prompt_tokens: Sequence[int] = ()
    """Of a conversation: how long the prompt of each turn was."""
    failure: str | None = None
    """Why there are no (more) rounds."""

    @property
    def median(self) -> Figures | None:
        return Figures.median(self.rounds) if self.rounds and self.failure is None else None

    def as_json(self) -> dict[str, Any]:
        """Return all of it, and the median."""
        return {**asdict(self), "median": asdict(self.median) if self.median else None}
