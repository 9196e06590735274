"""One live request in the API process, from admission to its one outcome.

Decides what text the tokens make, where a stop string cuts it, and when a deadline has passed.  Knows no worker: it is
told what happened, and says once that it is settled.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from app.config import DeadlineConfig
from app.engine.base import Chunk, GenerationRequest, TextDecoder
from app.engine.logprob_alignment import TokenSpans
from app.engine.stop_strings import StopBuffer
from app.errors import AppError, DeadlineExceeded, EngineFailed
from app.ipc.messages import TokenEvent
from app.types import FinishReason, TokenLogprob, Usage

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


class LiveRequest:
    """Gathers an answer as it comes; text that nobody has read yet waits as one piece, bounded by max_tokens."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        decoder: TextDecoder,
        deadlines: DeadlineConfig,
        on_settled: Callable[["LiveRequest"], None],
    ) -> None:
        """Start the clock.  `on_settled` is called once, at the moment of the outcome."""
        self.number = number
        self.request = request
        self.started_at: float | None = None
        """Loop time at which the model began on it, in seconds; None while it waits."""
        self.completion_tokens = 0
        """Tokens made so far, with the end token."""
        self._loop = asyncio.get_running_loop()
        self._decoder = decoder
        self._stops = StopBuffer(request.params.stop)
        self._spans = TokenSpans()
        self._cached_tokens = 0
        self._end_token: int | None = None
        self._deadlines = deadlines
        self._last_moment = self._loop.time() + deadlines.total_seconds
        self._on_settled = on_settled
        self._text: list[str] = []
        self._outcome: FinishReason | AppError | None = None
        self._news = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._arm(deadlines.waiting_seconds, "The request waited too long for the model.")

    @property
    def settled(self) -> bool:
        """Whether the outcome is known; nothing changes after it."""
        return self._outcome is not None

    def accept(self, event: TokenEvent) -> None:
        """Take in what the worker did; whatever comes after the outcome is ignored."""
        if self.settled:
            return
        if self.started_at is None:
            self.started_at = self._loop.time()
            self._cached_tokens = event.cached_tokens
            self._arm(self._deadlines.first_token_seconds, "The model took too long to its first token.")
        logprobs = event.logprobs or (None,) * len(event.token_ids)
        if not all(self._take(*token) for token in zip(event.token_ids, logprobs, strict=True)):
            return
        if event.error is not None:
            self.fail(EngineFailed(event.error))
        elif event.finish is not None:
            self.completion_tokens += event.finish == "stop"
            self._end_token = event.end_token
            self.end(_FINISH[event.finish])

    def end(self, reason: FinishReason) -> None:
        """Finish with what there is; the first outcome stays."""
        if self.settled:
            return
        rest = self._decoder.finish()
        self._spans.finish(rest)
        self._say(self._stops.feed(rest) + self._stops.finish())
        self._settle(reason if self._stops.matched is None else FinishReason.STOP)

    def fail(self, error: AppError) -> None:
        """Finish with an error; the first outcome stays."""
        if not self.settled:
            self._settle(error)

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Yield the text as it comes, then the one last chunk.

        Raises: AppError: the outcome is an error; it comes in place of the last chunk.
        """
        told = 0
        while True:
            await self._news.wait()
            self._news.clear()
            outcome, made, text = self._outcome, self.completion_tokens, "".join(self._text)
            self._text.clear()
            logprobs, ends = self._spans.show(len(text))
            if text:
                yield Chunk(text=text, tokens=made - told, logprobs=logprobs, token_ends=ends)
                told, logprobs, ends = made, (), ()
            if isinstance(outcome, AppError):
                raise outcome
            if outcome is not None:
                yield Chunk(
                    tokens=made - told,
                    finish_reason=outcome,
                    usage=Usage(len(self.request.prompt_ids), made, self._cached_tokens),
                    logprobs=logprobs,
                    token_ends=ends,
                    stopped_by=self._stopped_by(),
                )
                return

    def _stopped_by(self) -> str | int | None:
        """Return which of the request's own stop strings and tokens ended the answer."""
        if self._stops.matched is not None:
            return self._stops.matched
        return self._end_token if self._end_token in self.request.params.stop_token_ids else None

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Add a token and return whether the answer goes on after it."""
        self.completion_tokens += 1
        if self.completion_tokens == 1:
            self._arm(self._deadlines.total_seconds, "The answer took too long.")
        text = self._decoder.feed((token_id,))
        self._spans.add(text, logprob)
        self._say(self._stops.feed(text))
        if self._stops.matched is None:
            return True
        self._settle(FinishReason.STOP)
        return False

    def _say(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._news.set()

    def _settle(self, outcome: FinishReason | AppError) -> None:
        self._disarm()
        self._outcome = outcome
        self._news.set()
        self._on_settled(self)

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
