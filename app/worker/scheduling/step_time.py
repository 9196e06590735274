"""Models of how long a step takes, from which the prefill budget of the next step follows.

Pure: no torch and no clock; the runner measures.
"""

from typing import Protocol

MIN_SECONDS = 1e-6
"""Of a step, as far as division goes."""


class PrefillBudget(Protocol):
    """Learns from steps how many prompt tokens the next one should hold."""

    @property
    def scored_token_cost(self) -> float:
        """How many times as long a prompt token with logits takes as another one, >= 1."""

    def prefill_token_budget(self, decodes: int, waiting_prompts: int = 0) -> int:
        """Return how many prefill tokens the next step may hold.

        Args:
            decodes: sequences that decode a token in that step.
            waiting_prompts: sequences that wait for their first token; the more, the larger the budget.
        """

    def observe(self, tokens: int, seconds: float, *, prefill: int = 0, scored: int = 0) -> None:
        """Learn from a step.

        Args:
            prefill: how many of its tokens are of prompts.
            scored: how many of these have logits.
        """


class LinearFit:
    """`seconds = base + per_token * tokens`, fitted by exponentially weighted least squares."""

    SMOOTHING = 0.1
    """The weight of the newest step."""

    def __init__(self) -> None:
        self.steps = 0
        self.mean_tokens, self.mean_seconds = 0.0, 0.0
        self._variance, self._covariance = 0.0, 0.0

    @property
    def per_token(self) -> float | None:
        """Seconds of one more token; None while no two steps of different sizes say that it takes any."""
        return self._covariance / self._variance if self._covariance > 0 else None

    def seconds(self, tokens: float) -> float:
        """Return how long a step of so many tokens takes."""
        return self.mean_seconds + (self.per_token or 0.0) * (tokens - self.mean_tokens)

    def add(self, tokens: int, seconds: float) -> None:
        """Add a step."""
        self.steps += 1
        weight = max(self.SMOOTHING, 1 / self.steps)
        token_deviation = tokens - self.mean_tokens
        second_deviation = seconds - self.mean_seconds
        self.mean_tokens += weight * token_deviation
        self.mean_seconds += weight * second_deviation
        self._variance = (1 - weight) * (self._variance + weight * token_deviation**2)
        self._covariance = (1 - weight) * (self._covariance + weight * token_deviation * second_deviation)


class StepTimeModel:
    """The model of a processor, on which decode and prefill tokens count alike.

    A prompt token whose logits are read takes longer, by a time of its own that is learnt from steps that hold some.
    """

    MAX_PREFILL_TOKENS = 512
    MIN_PREFILL_TOKENS = 5
    INITIAL_PREFILL_TOKENS = 64
    """The budget while nothing has been measured."""
    MAX_SLOWDOWN = 0.8
    """How much longer a step may take with a chunk of one prompt than without, as a share."""
    MAX_WAITING_FACTOR = 4
    """Upper bound of the factor by which the slowdown grows when several prompts wait."""
    INITIAL_SCORED_COST = 2.0
    """Cost of a prompt token with logits while it has not been measured."""
    MAX_SCORED_COST = 4.0
    """Upper bound of that cost: on a busy machine some steps take much longer for no reason of their own."""

    def __init__(self) -> None:
        self._fit = LinearFit()
        self._scored_seconds: float | None = None
        """How much longer a prompt token with logits takes than another; None before one was measured."""

    @property
    def scored_token_cost(self) -> float:
        """Return how many times as long a prompt token with logits takes as another one, 1 to 4."""
        per_token = self._fit.per_token
        if self._scored_seconds is None or per_token is None:
            return self.INITIAL_SCORED_COST
        return min(1 + self._scored_seconds / per_token, self.MAX_SCORED_COST)

    def prefill_token_budget(self, decodes: int, waiting_prompts: int = 0) -> int:
        """Return so many tokens as make a step four fifths longer, or more where several prompts wait."""
        if not decodes:
            return self.MAX_PREFILL_TOKENS
        per_token = self._fit.per_token
        if per_token is None:
            return self.INITIAL_PREFILL_TOKENS
        decode_seconds = max(self._fit.seconds(decodes), per_token * decodes)
        factor = min(max(1, waiting_prompts), self.MAX_WAITING_FACTOR)
        budget = int(factor * self.MAX_SLOWDOWN * decode_seconds / per_token)
        return min(max(budget, self.MIN_PREFILL_TOKENS), self.MAX_PREFILL_TOKENS)

    def observe(self, tokens: int, seconds: float, *, prefill: int = 0, scored: int = 0) -> None:
        """Add a step to the fit, or where its prompt tokens have logits, to what those take."""
        if scored and self._fit.per_token is not None:
            extra = max(0.0, seconds - self._fit.seconds(tokens)) / scored
            known = self._scored_seconds
            self._scored_seconds = extra if known is None else known + LinearFit.SMOOTHING * (extra - known)
        else:
            self._fit.add(tokens, seconds)


class GpuStepTime:
    """The model of a GPU, where a chunk of a prompt costs a time of its own, however few tokens it has.

    Launching its kernels takes so long, or reading the weights once more.  So a chunk beside decoding sequences is at
    least so long that its tokens take as much as that does: shorter ones would be all cost.
    """

    MAX_PREFILL_TOKENS = 2048
    MIN_PREFILL_TOKENS = 64
    INITIAL_PREFILL_TOKENS = 512
    """The budget while nothing has been measured."""
    MAX_SECONDS = 1.0
    """No chunk should take longer, on the slowest GPU."""

    scored_token_cost = 1.0
    """Logits are one more product among hundreds."""

    def __init__(self) -> None:
        self._decode = LinearFit()
        self._prefill = LinearFit()
        """What prompts add to a step."""

    def prefill_token_budget(self, decodes: int, waiting_prompts: int = 0) -> int:
        """Return so many tokens as make a step four fifths longer, more where several prompts wait, or as many as take
        the time that a chunk costs by itself; all that a step may hold where more tokens take no longer."""
        if not self._prefill.steps:
            return self.INITIAL_PREFILL_TOKENS
        mean_seconds = max(self._prefill.mean_seconds, MIN_SECONDS)
        most = min(self.MAX_PREFILL_TOKENS, int(self.MAX_SECONDS * self._prefill.mean_tokens / mean_seconds))
        per_token, fixed = self._prefill.per_token, max(0.0, self._prefill.seconds(0))
        if not decodes or per_token is None:
            return max(most, self.MIN_PREFILL_TOKENS)
        factor = min(max(1, waiting_prompts), StepTimeModel.MAX_WAITING_FACTOR)
        bearable = factor * StepTimeModel.MAX_SLOWDOWN * self._decode.seconds(decodes)
        budget = int(max(bearable - fixed, fixed) / per_token)
        return max(min(budget, most), self.MIN_PREFILL_TOKENS)

    def observe(self, tokens: int, seconds: float, *, prefill: int = 0, scored: int = 0) -> None:
        """Add a step to the fit of steps without prompts, or what it takes beyond those to that of prompts."""
        if not prefill:
            self._decode.add(tokens, seconds)
            return
        decodes = tokens - prefill
        self._prefill.add(prefill, seconds - (self._decode.seconds(decodes) if decodes else 0.0))
