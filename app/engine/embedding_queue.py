"""The embedding requests of one worker, from admission to their vectors.

Decides which are admitted and when a deadline has passed.  Runs on the event loop; an engine hands it what its worker
says.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from app.config import DeadlineConfig
from app.embeddings import FLOAT_BYTES, EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.base import EngineInfo
from app.engine.deadline import deadline
from app.engine.worker_status import not_ready
from app.errors import AppError, EngineBusy, EngineFailed, InvalidRequest, ShuttingDown
from app.fair_share import fits_share
from app.ipc.messages import Embed, Embedded, TokenEvent
from app.ipc.supervisor import Supervisor
from app.types import EngineState

BUSY_RETRY_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended."""

    request: EmbeddingRequest
    encoded: EncodedInputs
    vectors: list[bytes]
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the model begins, and at the outcome."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: AppError | None = None

    def end(self, error: AppError | None = None) -> None:
        """Set the outcome; the first one stays."""
        if not self.ended.is_set():
            self.error = error
            self.started.set()
            self.ended.set()


class EmbeddingQueue:
    """Holds the embedding requests that a worker has been given."""

    def __init__(
        self, worker: Supervisor, numbers: Iterator[int], deadlines: DeadlineConfig, max_waiting_tokens: int
    ) -> None:
        """Args:
        worker: computes the vectors.
        numbers: of the messages to it; never the same one twice.
        max_waiting_tokens: that one tenant's requests may hold while no other tenant's hold any.
        """
        self._worker = worker
        self._numbers = numbers
        self._deadlines = deadlines
        self._max_waiting_tokens = max_waiting_tokens
        self._live: dict[int, _Live] = {}

    @property
    def running(self) -> int:
        """Return how many requests the model has begun."""
        return sum(live.started.is_set() for live in self._live.values())

    @property
    def waiting(self) -> int:
        """Return how many requests wait for the model."""
        return len(self._live) - self.running

    async def run(self, request: EmbeddingRequest, info: EngineInfo) -> Embeddings:
        """Return the vectors of a prepared request.

        Raises: EngineNotReady, EngineBusy, InvalidRequest: it is not taken.  EngineFailed, DeadlineExceeded,
            ShuttingDown: it was, and has no result.
        """
        encoded = self._admit(request, info)
        number, live = next(self._numbers), _Live(request, encoded, [b""] * len(encoded.token_ids))
        self._live[number] = live
        try:
            self._worker.submit(_message(number, request, encoded))
            last = asyncio.get_running_loop().time() + self._deadlines.total_seconds
            async with deadline(self._deadlines.waiting_seconds, "The request waited too long for the model."):
                await live.started.wait()
            async with deadline(last - asyncio.get_running_loop().time(), "The vectors took too long."):
                await live.ended.wait()
        finally:
            del self._live[number]
            self._worker.cancel(number)
        if live.error is not None:
            raise live.error
        return _result(live, info)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored."""
        for live in self._live.values():
            if live.request.id == request_id:
                live.end(ShuttingDown())

    def on_event(self, event: TokenEvent) -> None:
        """Note that a request has begun or ended; one that nobody waits for any more is ignored."""
        if (live := self._live.get(event.id)) is None:
            return
        live.started.set()
        if event.error is not None:
            live.end(InvalidRequest(event.error) if event.invalid else EngineFailed(event.error))
        elif event.finish is not None:
            live.end(None if event.finish == "stop" else ShuttingDown())

    def on_embedded(self, embedded: Embedded) -> None:
        """Keep the vectors of some texts."""
        if (live := self._live.get(embedded.id)) is not None:
            for position, vector in zip(embedded.positions, embedded.vectors, strict=True):
                live.vectors[position] = vector
                live.request.progress.computed += len(live.encoded.token_ids[position])

    def on_unresponsive(self) -> None:
        """Fail every request: the worker gives no sign of life."""
        self._fail_all(EngineFailed("The model's worker does not respond. Try again later."))

    def on_lost(self) -> None:
        """Fail every request: the worker is gone."""
        self._fail_all(EngineFailed("The model's worker failed during this request. Try again."))

    def on_close(self) -> None:
        """Fail every request: the service ends."""
        self._fail_all(ShuttingDown())

    def _fail_all(self, error: AppError) -> None:
        for live in self._live.values():
            live.end(error)

    def _admit(self, request: EmbeddingRequest, info: EngineInfo) -> EncodedInputs:
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        if info.embedding is None or request.encoded is None:
            raise InvalidRequest("This model does not embed texts.")
        info.embedding.check_dimensions(request.dimensions)
        request.encoded.check(info.embedding, info.vocab_size)
        own = sum(live.encoded.tokens for live in self._live.values() if live.request.tenant == request.tenant)
        total = sum(live.encoded.tokens for live in self._live.values())
        if own and not fits_share(request.encoded.tokens, held=own, total=total, most=self._max_waiting_tokens):
            raise EngineBusy(
                "The model has as many texts to embed as it can take. Try again later.", retry_after=BUSY_RETRY_SECONDS
            )
        return request.encoded


def _message(number: int, request: EmbeddingRequest, encoded: EncodedInputs) -> Embed:
    return Embed(
        id=number,
        inputs=encoded.token_ids,
        tenant=str(request.tenant),
        dimensions=request.dimensions,
        prompt_tokens=encoded.prompt_tokens,
        priority=request.priority,
    )


def _result(live: _Live, info: EngineInfo) -> Embeddings:
    return Embeddings(
        vectors=tuple(live.vectors),
        dimension=len(live.vectors[0]) // FLOAT_BYTES,
        prompt_tokens=live.encoded.tokens,
        model=info.model,
    )
