"""What the answers to one ask cost and how fast they came.  Knows no text."""

import time

from app.engine.base import Chunk
from app.generation.requests import Context, Ending, Finished
from app.telemetry import Metrics
from app.types import Usage


class Meter:
    """Watches the answers to one ask as the engine makes them."""

    def __init__(self, model: str, metrics: Metrics, answers: int = 1) -> None:
        """Start the clock."""
        self.last = [Chunk()] * answers
        """The newest chunk of each; once all have ended, those with the finish reasons."""
        self.first_token_seconds: float | None = None
        """How long the first token of all was waited for."""
        self.replayed = 0
        """Tokens that came from another request's answer."""
        self._model = model
        self._began = time.monotonic()
        self._metrics = metrics
        self._tokens = [0] * answers
        self._before = [time.monotonic()] * answers

    def see(self, index: int, chunk: Chunk) -> None:
        """Take in the next chunk of an answer: the first token of all is waited for once, each answer has its gaps."""
        self.last[index] = chunk
        if chunk.tokens and self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self._began
        if chunk.cached:
            self.replayed += chunk.tokens
        if chunk.tokens and not chunk.cached:
            now = time.monotonic()
            if self._tokens[index]:
                self._metrics.token_gap(self._model, (now - self._before[index]) / chunk.tokens)
            elif not any(self._tokens):
                self._metrics.first_token(self._model, now - self._before[index])
            self._before[index] = now
            self._tokens[index] += chunk.tokens

    @property
    def cached(self) -> bool:
        """Whether all answers come from the cache, as their first chunks tell already."""
        return all(each.cached for each in self.last)

    @property
    def made(self) -> int:
        """Tokens that the model made for this ask."""
        return sum(self._tokens)

    def settle(self, prompt_tokens: int) -> None:
        """Count what the model really did, whether the answers were read to their end or not."""
        if self.made:
            self._metrics.generated(self._model, prompt_tokens, self.made)

    def finished(self, *, session_id: str | None = None, context: Context | None = None) -> Finished:
        """Raises: RuntimeError: the engine broke its promise of a last chunk."""
        ended = [(each, each.finish_reason, each.usage) for each in self.last if each.finish_reason and each.usage]
        if len(ended) < len(self.last):
            raise RuntimeError("the engine ended without a last chunk")
        endings = tuple(
            Ending(finish_reason=reason, tokens=usage.completion_tokens, stopped_by=chunk.stopped_by)
            for chunk, reason, usage in ended
        )
        first = ended[0][2]
        return Finished(
            model=self._model,
            endings=endings,
            usage=Usage(first.prompt_tokens, sum(ending.tokens for ending in endings), first.cached_tokens),
            cached=self.cached,
            session_id=session_id,
            context=context,
        )
