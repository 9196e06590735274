"""Counts the tokens of one request and measures how fast they arrive."""

import time

from app.errors import AppError, EngineBusy
from app.events import Delta, Event, Finished
from app.requests import GenerationRequest
from app.telemetry import ModelMetrics
from app.types import FinishReason

_ERROR, _QUEUE_FULL = "error", "queue_full"
"""How a request ended that failed, and why one was not taken."""


class RequestStats:
    """Latency and tokens of the samples of one prompt."""

    def __init__(self, metrics: ModelMetrics, samples: tuple[GenerationRequest, ...]) -> None:
        """Start the clock.  Args: samples: whose progress counts what the engine generates."""
        self.first_token_seconds: float | None = None
        """How long the first token of all took."""
        self._error: AppError | None = None
        """What ended it."""
        self._metrics = metrics
        self._samples = samples
        self._began = time.monotonic()
        self._last_token = [self._began] * len(samples)
        self._seen = [0] * len(samples)
        self._received = [0] * len(samples)
        self.reasons: tuple[FinishReason, ...] = (FinishReason.ABORT,) * len(samples)
        self.received_prompt = False
        """Whether log-probabilities of the prompt were received."""

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the prompt as the engine has counted it; 0 where it has not."""
        return max(sample.progress.prompt for sample in self._samples)

    @property
    def generated(self) -> int:
        """Return the tokens that the engine has generated for this request, whether they were read or not."""
        return sum(sample.progress.generated for sample in self._samples)

    @property
    def replayed(self) -> int:
        """Return the tokens received beyond those, which were generated for another request."""
        generated = [sample.progress.generated for sample in self._samples]
        return sum(max(0, received - own) for received, own in zip(self._received, generated, strict=True))

    @property
    def computed_prompt(self) -> bool:
        """Return whether the prompt was computed for this request."""
        progresses = [sample.progress for sample in self._samples]
        return any((each.generated or each.read_prompt) and not each.shares_prompt for each in progresses)

    def observe(self, event: Event) -> None:
        """Record an event: the first token of all is timed once, and each sample has its inter-token latencies."""
        if isinstance(event, Finished):
            self.reasons = tuple(each.finish_reason for each in event.samples)
        if not isinstance(event, Delta):
            return
        self.received_prompt |= bool(event.prompt_logprobs)
        if not event.tokens:
            return
        index, tokens = event.index, event.tokens
        now = time.monotonic()
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._began
        self._received[index] += tokens
        if self._received[index] > self._samples[index].progress.generated:
            return  # what another request's generation takes is no latency of this one's
        if self._seen[index]:
            self._metrics.token_gap((now - self._last_token[index]) / tokens)
        elif not any(self._seen):
            self._metrics.first_token(now - self._began)
        self._last_token[index] = now
        self._seen[index] += tokens

    def fail(self, error: AppError) -> None:
        """Note what ended the request."""
        self._error = error

    def close(self, prompt_tokens: int) -> None:
        """Report what the engine generated, whether it was read to its end or not."""
        if self.computed_prompt:
            # The other samples copy the prompt of the first, which the request had computed itself.
            cached = next(each.progress.cached for each in self._samples if not each.progress.shares_prompt)
            self._metrics.generated(prompt_tokens, self.generated, cached_tokens=cached)
        elif self.generated:
            self._metrics.generated(0, self.generated)
        if isinstance(self._error, EngineBusy):
            self._metrics.rejected(_QUEUE_FULL)
        self._count_samples(prompt_tokens)

    def _count_samples(self, prompt_tokens: int) -> None:
        own = [each for each in zip(self._samples, self.reasons, strict=True) if _is_own(each[0])]
        if not own:
            return
        longest = max(sample.progress.generated for sample, _ in own)
        self._metrics.request_done(time.monotonic() - self._began, longest)
        max_tokens = self._samples[0].sampling.max_tokens
        self._metrics.requested(prompt_tokens, max_tokens=max_tokens, samples=len(self._samples))
        for sample, reason in own:
            progress = sample.progress
            self._metrics.sample_done(_ERROR if self._error else reason.value, progress.generated, progress.times)


def _is_own(sample: GenerationRequest) -> bool:
    """Return whether the engine worked on a sample for this request, and not for another whose response it shares."""
    return bool(sample.progress.generated) or sample.progress.times.accepted is not None
