"""The state of one live request in the API process, from admission to its one outcome.

Decides what text the tokens become, where a stop string cuts it, and when a deadline has passed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from app.config import DeadlineConfig
from app.engine.base import Tokenizer
from app.engine.logprob_alignment import LogprobAlignment
from app.engine.prompt_scores import PromptScores
from app.engine.stop_strings import EndStrings, StopBuffer, hidden_stops
from app.engine.tokenizer.detokenize import detokenize_logprobs
from app.engine.tokenizer.shown_tokens import completion_decoder
from app.errors import AppError, DeadlineExceeded, EngineFailed, InvalidRequest
from app.events import Delta, Finished, finish
from app.ipc.messages import TokenEvent
from app.requests import GenerationRequest
from app.types import FinishReason, TokenLogprob, Usage

LOGPROBS_PER_DELTA = 16
"""Tokens with log-probabilities that are held back from a request that does not stream: turning more of them into
text, and what follows from that, would hold up the event loop."""

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


class LiveRequest:
    """Collects a completion as the worker generates it; unread text is merged, bounded by max_tokens."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        deadlines: DeadlineConfig,
        on_outcome: Callable[["LiveRequest"], None],
        end_strings: Sequence[str] = (),
    ) -> None:
        """Start the clock.

        Args:
            on_outcome: called once, at the moment of the outcome.
            end_strings: the model's own, which end a completion as its end tokens do.
        """
        self.number = number
        self.request = request
        self.started_at: float | None = None
        """Loop time at which the model began on it, in seconds; None while it waits."""
        self._progress = request.progress
        self._times = request.progress.times
        self._times.accepted = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._tokenizer = tokenizer
        self._decoder = completion_decoder(tokenizer, request)
        self._stops = StopBuffer(request.sampling.stop)
        self._ends = EndStrings(() if request.sampling.ignore_eos else end_strings)
        self.hidden_stops = hidden_stops(request.sampling, tokenizer)
        """The stop strings that name tokens which no text shows, by those tokens."""
        self._alignment = LogprobAlignment[TokenLogprob]()
        scored = request.sampling.prompt_logprobs is not None
        self._scores = PromptScores(request, tokenizer) if scored else None
        self._end_token: int | None = None
        self._deadlines = deadlines
        self._last_moment = self._loop.time() + deadlines.total_seconds
        self._on_outcome = on_outcome
        self._text: list[str] = []
        self._token_ends: list[int] = []
        """For each token that no delta has reported where its text ends in the next one, if the request wants it."""
        self._length = 0
        """Characters of the next delta up to now."""
        self._begun = False
        """Whether a delta has been yielded."""
        self._reported = 0
        """Tokens of the deltas yielded so far."""
        self._outcome: FinishReason | AppError | None = None
        self._updated = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._arm(deadlines.waiting_seconds, "The request waited too long for the model.")

    @property
    def is_over(self) -> bool:
        """Return whether the outcome is known; nothing changes after it."""
        return self._outcome is not None

    def accept(self, event: TokenEvent) -> None:
        """Apply what the worker generated; whatever comes after the outcome is ignored."""
        if self.is_over:
            return
        if self.started_at is None:
            self.started_at = self._loop.time()
            self._times.began = time.monotonic()
            self._progress.cached = event.cached_tokens
            self._arm(self._deadlines.first_token_seconds, "The model took too long to its first token.")
        if event.prompt_logprobs:
            self._add_scores(event.prompt_logprobs)
        count = len(event.token_ids)
        logprobs, rest = event.logprobs[:count] or (None,) * count, event.logprobs[count:]
        if not all(self._take(*token) for token in zip(event.token_ids, logprobs, strict=True)):
            return
        for end_token in rest:
            self._alignment.add("", end_token)
        if event.error is not None:
            self.fail(InvalidRequest(event.error) if event.invalid else EngineFailed(event.error))
        elif event.finish is not None:
            self._progress.generated += event.end_token is not None
            self._progress.read_prompt |= not self.request.sampling.max_tokens
            self._end_token = event.end_token
            self.end(_FINISH[event.finish])

    def end(self, reason: FinishReason) -> None:
        """Finish with what there is; the first outcome stays."""
        if self.is_over:
            return
        rest = self._decoder.finish()
        self._alignment.finish(rest)
        self._append(self._stops.feed(rest) + self._stops.finish())
        self._finish(reason if self._stops.matched is None else FinishReason.STOP)

    def fail(self, error: AppError) -> None:
        """Finish with an error; the first outcome stays."""
        if not self.is_over:
            self._finish(error)

    async def events(self) -> AsyncGenerator[Delta | Finished, None]:
        """Yield the prompt's log-probabilities as it is computed, deltas as the text grows, then Finished.

        A request that does not stream gets one delta with the first token and one with all that follows, or several
        if there are many log-probabilities.

        Raises: AppError: the outcome is an error; it comes in place of Finished.
        """
        while True:
            await self._updated.wait()
            self._updated.clear()
            while self._scores is not None and (scores := self._scores.take()):
                yield Delta(prompt_logprobs=scores)
                await asyncio.sleep(0)
            outcome = self._outcome
            delta = self._next_delta()
            if delta.is_visible:
                self._begun = True
                self._reported += delta.tokens
                yield delta
            if isinstance(outcome, AppError):
                raise outcome
            if outcome is not None:
                usage = Usage(self.request.prompt_tokens, self._progress.generated, self._progress.cached)
                yield finish(outcome, usage, self._stop_reason())
                return

    def _add_scores(self, logprobs: Sequence[TokenLogprob]) -> None:
        self._progress.read_prompt = True
        if self._scores is not None:
            self._scores.add(logprobs)
            self._updated.set()

    def _next_delta(self) -> Delta:
        text = "".join(self._text)
        self._text.clear()
        ends, self._length = tuple(self._token_ends), 0
        logprobs, logprob_ends = self._alignment.release(len(text))
        if text or logprobs:
            self._token_ends.clear()
        return Delta(
            text=text,
            tokens=self._progress.generated - self._reported,
            logprobs=detokenize_logprobs(logprobs, self._tokenizer) if logprobs else (),
            token_ends=logprob_ends,
            ends=ends,
        )

    def _stop_reason(self) -> str | int | None:
        """Return which of the request's own stop strings and tokens ended the completion."""
        if self._stops.matched is not None:
            return self._stops.matched
        if self._end_token in self.request.sampling.stop_token_ids or self._end_token is None:
            return self._end_token
        return self.hidden_stops.get(self._end_token)

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Append a token and return whether generation continues after it."""
        self._progress.generated += 1
        if self._progress.generated == 1:
            self._times.first_token = time.monotonic()
            self._arm(self._deadlines.total_seconds, "The answer took too long.")
        text = self._decoder.feed((token_id,))
        self._alignment.add(text, logprob)
        self._append(self._stops.feed(text))
        if self.request.shown_tokens is not None:
            self._token_ends.append(self._length)
        if self._stops.matched is not None:
            self._finish(FinishReason.STOP)
        elif self._ends.feed(text):
            self.end(FinishReason.STOP)
        return not self.is_over

    def _append(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._length += len(text)
            if self.request.stream or not self._begun or len(self._alignment) >= LOGPROBS_PER_DELTA:
                self._updated.set()

    def _finish(self, outcome: FinishReason | AppError) -> None:
        self._disarm()
        self._times.ended = time.monotonic()
        self._outcome = outcome
        self._updated.set()
        self._on_outcome(self)

    def _arm(self, seconds: float, message: str) -> None:
        """Set the deadline of the phase that begins now; the total one stands above it."""
        self._disarm()
        moment = self._loop.time() + seconds
        if moment >= self._last_moment:
            moment, message = self._last_moment, "The answer took too long."
        self._timer = self._loop.call_at(moment, self._expire, message)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self, message: str) -> None:
        self.fail(DeadlineExceeded(message))
