"""A model of how long a step takes, from which the prefill budget of the next step follows.

Pure: no torch and no clock; the runner measures.
"""


class StepTimeModel:
    """Models step time as `base + per_token * tokens`, fitted by exponentially weighted least squares.

    Decode and prefill tokens count alike.  A prompt token whose logits are read takes longer, by a time of its own that
    is learnt from the steps that hold some.
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
    SMOOTHING = 0.1
    """The weight of the newest step."""

    def __init__(self) -> None:
        self._mean_tokens, self._mean_seconds = 0.0, 0.0
        self._variance, self._covariance = 0.0, 0.0
        self._steps = 0
        self._scored_seconds: float | None = None
        """How much longer a prompt token with logits takes than another; None before one was measured."""

    @property
    def scored_token_cost(self) -> float:
        """Return how many times as long a prompt token with logits takes as another one, 1 to 4."""
        if self._scored_seconds is None or self._covariance <= 0:
            return self.INITIAL_SCORED_COST
        return min(1 + self._scored_seconds * self._variance / self._covariance, self.MAX_SCORED_COST)

    def prefill_token_budget(self, decodes: int, waiting_prompts: int = 0) -> int:
        """Return how many prefill tokens the next step may hold.

        Args:
            decodes: sequences that decode a token in that step.
            waiting_prompts: sequences that wait for their first token; the more, the larger the budget.
        """
        if not decodes:
            return self.MAX_PREFILL_TOKENS
        if self._covariance <= 0:
            return self.INITIAL_PREFILL_TOKENS
        per_token = self._covariance / self._variance
        decode_seconds = max(self._mean_seconds + per_token * (decodes - self._mean_tokens), per_token * decodes)
        factor = min(max(1, waiting_prompts), self.MAX_WAITING_FACTOR)
        budget = int(factor * self.MAX_SLOWDOWN * decode_seconds / per_token)
        return min(max(budget, self.MIN_PREFILL_TOKENS), self.MAX_PREFILL_TOKENS)

    def observe(self, tokens: int, seconds: float, *, scored: int = 0) -> None:
        """Add a step to the fit.  Args: scored: how many of its tokens are of a prompt and have logits."""
        if scored and self._covariance > 0:
            usual = self._mean_seconds + self._covariance / self._variance * (tokens - self._mean_tokens)
            extra = max(0.0, seconds - usual) / scored
            known = self._scored_seconds
            self._scored_seconds = extra if known is None else known + self.SMOOTHING * (extra - known)
            return
        self._steps += 1
        weight = max(self.SMOOTHING, 1 / self._steps)
        token_deviation = tokens - self._mean_tokens
        second_deviation = seconds - self._mean_seconds
        self._mean_tokens += weight * token_deviation
        self._mean_seconds += weight * second_deviation
        self._variance = (1 - weight) * (self._variance + weight * token_deviation**2)
        self._covariance = (1 - weight) * (self._covariance + weight * token_deviation * second_deviation)
