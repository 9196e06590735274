"""The generation requests of one worker, from admission to their outcome.

Decides which are admitted, and which one an event belongs to.  Runs on the event loop; an engine hands it what its
worker says.  `embedding_queue.py` is the same for embedding requests.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence

from app.config import DeadlineConfig
from app.engine.base import EngineInfo, Tokenizer
from app.engine.live_request import LiveRequest
from app.engine.stop_strings import with_stop_tokens
from app.engine.worker_adapters import WorkerAdapters
from app.engine.worker_status import not_ready
from app.errors import ContextLengthExceeded, EngineBusy, EngineFailed, InvalidRequest
from app.fair_share import fits_share
from app.ipc.messages import Submit, TokenEvent
from app.ipc.supervisor import Supervisor
from app.requests import GenerationRequest
from app.types import BACKGROUND_PRIORITY, EngineState, FinishReason

log = logging.getLogger(__name__)

BUSY_RETRY_SECONDS = (1.0, 30.0)
"""Bounds of the Retry-After of a refused request."""
BACKGROUND_PATIENCE = 12
"""As many times the deadlines of others those of the background are: it waits for all of them, again and again."""


class CompletionRate:
    """Measures how fast requests finish, so that a refused client learns when to try again."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=16)

    def add(self, moment: float) -> None:
        """Record the end of a request, at a time in seconds."""
        self._moments.append(moment)

    def seconds_each(self) -> float:
        """Return the mean seconds from one end to the next, over the last few; 0 before there were two."""
        if len(self._moments) < 2:
            return 0.0
        return (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)


class GenerationQueue:
    """Holds the generation requests that a worker has been given."""

    def __init__(
        self,
        worker: Supervisor,
        adapters: WorkerAdapters,
        numbers: Iterator[int],
        deadlines: DeadlineConfig,
        *,
        max_waiting: int,
        max_waiting_tokens: int,
    ) -> None:
        """Args:
        worker: generates.
        adapters: what it has loaded beside the model.
        numbers: of the messages to it; never the same one twice.
        max_waiting: requests of one tenant that may wait for a slot while no other tenant has any.
        max_waiting_tokens: tokens of their prompts, likewise.
        """
        self._worker = worker
        self._adapters = adapters
        self._numbers = numbers
        self._deadlines = deadlines
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._live: dict[int, LiveRequest] = {}
        self._completion_rate = CompletionRate()

    @property
    def running(self) -> int:
        """Return how many requests the model has begun."""
        return sum(live.started_at is not None for live in self._live.values())

    @property
    def waiting(self) -> int:
        """Return how many requests wait for the model."""
        return len(self._live) - self.running

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the adapters of running requests, and of waiting ones."""
        named = [(live.request.adapter, live.started_at is not None) for live in self._live.values()]
        running = {name for name, runs in named if name is not None and runs}
        waiting = {name for name, runs in named if name is not None and not runs}
        return tuple(sorted(running)), tuple(sorted(waiting))

    def admit(self, request: GenerationRequest, info: EngineInfo, tokenizer: Tokenizer, slots: int) -> LiveRequest:
        """Give a prepared request to the worker.  Whoever has it from here ends it.

        Args: slots: requests that the model runs at once.
        Raises: EngineNotReady, EngineBusy, InvalidRequest: it is not taken.
        """
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        self._refuse_misfit(request, info)
        self._refuse_too_many(request, slots)
        background = request.priority >= BACKGROUND_PRIORITY
        deadlines = self._deadlines.times(BACKGROUND_PATIENCE) if background else self._deadlines
        live = LiveRequest(next(self._numbers), request, tokenizer, deadlines, self._forget, info.stop_strings)
        self._live[live.number] = live
        message = Submit(
            id=live.number,
            prompt_ids=request.prompt_ids or (),
            params=with_stop_tokens(request.sampling, live.hidden_stops),
            tenant=_scheduled_tenant(request),
            adapter=request.adapter_digest,
            priority=request.priority,
        )
        try:
            self._worker.submit(message)
        except UnicodeEncodeError:
            live.end(FinishReason.ABORT)
            raise InvalidRequest("A stop string or the grammar is not valid Unicode text.") from None
        return live

    def abort(self, request_id: str) -> None:
        """End a request now, with the text that it has; unknown ids are ignored."""
        for live in tuple(self._live.values()):
            if live.request.id == request_id:
                live.end(FinishReason.ABORT)

    def on_event(self, event: TokenEvent) -> None:
        """Route an event to its request; an event of one that has ended, or that is not ours, is ignored."""
        if (live := self._live.get(event.id)) is None:
            return
        try:
            live.accept(event)
        except Exception as error:  # noqa: BLE001  # one bad completion must not end the others
            # Without its message, which could hold the text.
            log.error("a completion could not be decoded: %s", type(error).__name__)
            live.fail(EngineFailed("The model's answer could not be decoded."))

    def on_unresponsive(self) -> None:
        """Fail every request; the worker is told to drop them, which it reads if it comes back."""
        self._fail_all("The model's worker does not respond. Try again later.")

    def on_lost(self) -> None:
        """Fail every request: the worker is gone."""
        self._fail_all("The model's worker failed during this request. Try again.")

    def on_close(self) -> None:
        """Finish every request with the text that it has."""
        for live in tuple(self._live.values()):
            live.end(FinishReason.ABORT)

    def _fail_all(self, message: str) -> None:
        for live in tuple(self._live.values()):
            live.fail(EngineFailed(message))

    def _refuse_misfit(self, request: GenerationRequest, info: EngineInfo) -> None:
        """Raises: InvalidRequest, ContextLengthExceeded, EngineFailed: the model cannot serve such a request."""
        prompt_tokens, max_tokens = request.prompt_tokens, request.sampling.max_tokens
        if prompt_tokens == 0:
            raise InvalidRequest("The prompt is empty.")
        info.capabilities.check(request)
        self._adapters.check(request.adapter_digest)
        if prompt_tokens + max_tokens > info.context_length:
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=max_tokens, limit=info.context_length)
        if any(live.request.id == request.id for live in self._live.values()):
            raise ValueError("a live request has this id already")

    def _refuse_too_many(self, request: GenerationRequest, slots: int) -> None:
        """Refuse a request whose tenant has its share of the queue, in requests or in tokens of waiting prompts.

        A tenant that has no request here may always have one, and one prompt in the queue.  The samples of a request
        have one prompt together, which counts with the first.

        Raises: EngineBusy: it has; other tenants may still find a place.
        """
        everyone = [live.request for live in self._live.values()]
        waiting = [live.request for live in self._live.values() if live.started_at is None]
        own = [each for each in everyone if each.tenant == request.tenant]
        own_waiting = [each for each in waiting if each.tenant == request.tenant]
        places = slots + self._max_waiting
        tokens, most_tokens = _prompt_tokens([request]), self._max_waiting_tokens
        if (not own or fits_share(1, held=len(own), total=len(everyone), most=places)) and (
            not own_waiting
            or not tokens
            or fits_share(tokens, held=_prompt_tokens(own_waiting), total=_prompt_tokens(waiting), most=most_tokens)
        ):
            return
        least, most = BUSY_RETRY_SECONDS
        raise EngineBusy(
            "The model has as many requests as it can take. Try again later.",
            retry_after=min(max(self._completion_rate.seconds_each() * len(waiting), least), most),
        )

    def _forget(self, live: LiveRequest) -> None:
        """Forget a request at its outcome, and stop the worker on it if it has not ended there."""
        del self._live[live.number]
        self._worker.cancel(live.number)
        if live.started_at is not None:
            self._completion_rate.add(asyncio.get_running_loop().time())


def _scheduled_tenant(request: GenerationRequest) -> str:
    """Return as whose a request takes its turn: what a tenant's batches compute counts not against its live requests.

    No tenant's text begins so.
    """
    return f"batch {request.tenant}" if request.priority >= BACKGROUND_PRIORITY else str(request.tenant)


def _prompt_tokens(requests: Sequence[GenerationRequest]) -> int:
    return sum(each.prompt_tokens for each in requests if each.sampling.sample == 0)
