"""Runs embedding requests: a pass at a time, each over texts of several requests.

Decides which requests a failure ends.  The scheduler chooses the texts; an `Encoder` turns their tokens into vectors.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.embeddings import EmbeddingInfo
from app.ipc.messages import Embed, Embedded, TokenEvent
from app.worker.embedding.embedding_scheduler import EmbeddingScheduler, Text
from app.worker.embedding.pooling import Head
from app.worker.validation import failure_reason

log = logging.getLogger(__name__)

Report = Callable[[list[Embedded], list[TokenEvent]], None]
"""Sends what a pass has done."""


class Encoder(Protocol):
    """Computes the last hidden states of some texts."""

    @property
    def info(self) -> EmbeddingInfo:
        """How the model embeds."""

    @property
    def vocab_size(self) -> int:
        """Entries of the embedding table."""

    @property
    def head(self) -> Head:
        """What becomes of the hidden states."""

    def hidden_states(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Compute a batch that is padded on the right.

        Args: token_ids, mask: (texts, tokens); the mask is false for padding.
        Returns: (texts, tokens, size).
        """

    def pad(self, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return texts as token ids and mask, both (texts, tokens) on the model's device."""


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    request: Embed
    missing: int
    """Texts without a vector."""
    started: bool = False


class VectorError(Exception):
    """A vector is no use; the message is for the client."""


class EmbeddingRunner:
    """Embeds for several requests at once, fairly between tenants."""

    def __init__(self, encoder: Encoder, max_batch_tokens: int) -> None:
        """Args: max_batch_tokens: of a pass, with padding."""
        self._encoder = encoder
        self._scheduler = EmbeddingScheduler(max_batch_tokens)
        self._live: dict[int, _Live] = {}
        self._pending_events: list[TokenEvent] = []

    @property
    def busy(self) -> bool:
        """Whether a request is live, or an event has not been sent."""
        return bool(self._live or self._pending_events)

    def submit(self, request: Embed) -> None:
        """Take a request; one that the model cannot embed gets an error event in the next pass."""
        info, vocab_size = self._encoder.info, self._encoder.vocab_size
        if not request.inputs or not all(0 < len(ids) <= info.max_tokens for ids in request.inputs):
            reason = f"A text has no token, or more than {info.max_tokens}."
        elif not all(0 <= token < vocab_size for ids in request.inputs for token in ids):
            reason = "The request holds a token outside the model's vocabulary."
        else:
            lengths = tuple(map(len, request.inputs))
            self._live[request.id] = _Live(request, len(lengths))
            self._scheduler.add(request.id, lengths, tenant=request.tenant, priority=request.priority)
            return
        self._pending_events.append(TokenEvent(request.id, error=reason, invalid=True))

    def cancel(self, request_id: int) -> None:
        """End a request before the next pass; unknown ids are ignored."""
        if self._live.pop(request_id, None) is not None:
            self._scheduler.remove(request_id)
            self._pending_events.append(TokenEvent(request_id, finish="abort"))

    def step(self, report: Report) -> None:
        """Compute one pass and report it.

        Raises: torch.AcceleratorError: the device is in an unknown state, and with it this process.
        """
        events, self._pending_events = self._pending_events, []
        texts = self._scheduler.next_pass()
        events += [TokenEvent(request_id) for request_id in self._starting(texts)]
        embedded, ended = self._compute(texts) if texts else ([], [])
        report(embedded, events + ended)

    def _starting(self, texts: Sequence[Text]) -> list[int]:
        """Return the requests of which these texts are the first."""
        starting = [each for each in dict.fromkeys(text.request_id for text in texts) if not self._live[each].started]
        for request_id in starting:
            self._live[request_id].started = True
        return starting

    def _compute(self, texts: Sequence[Text]) -> tuple[list[Embedded], list[TokenEvent]]:
        try:
            vectors = self._vectors(texts)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(texts) > 1:
                log.exception("a pass over %d texts failed", len(texts))
                return self._one_by_one(texts)
            reason = str(error) if isinstance(error, VectorError) else failure_reason(error)
            return [], [self._fail(texts[0].request_id, reason)]
        return self._finish(texts, vectors)

    def _one_by_one(self, texts: Sequence[Text]) -> tuple[list[Embedded], list[TokenEvent]]:
        """Compute each text of a failed pass by itself: one that fails again ends its request."""
        embedded: list[Embedded] = []
        events: list[TokenEvent] = []
        for text in texts:
            if text.request_id in self._live:
                more, ended = self._compute([text])
                embedded += more
                events += ended
        return embedded, events

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[Text]) -> list[bytes]:
        """Raises: VectorError: a number of a vector is not finite."""
        requests = [self._live[text.request_id].request for text in texts]
        ids = [request.inputs[text.position] for request, text in zip(requests, texts, strict=True)]
        token_ids, mask = self._encoder.pad(ids)
        states = self._encoder.hidden_states(token_ids, mask)
        pooled = mask.clone()
        for row, request in enumerate(requests):
            # A text of nothing but its prompt would leave nothing to pool.
            if request.prompt_tokens < len(ids[row]):
                pooled[row, : request.prompt_tokens] = False
        vectors = self._encoder.head(states, pooled, [request.dimensions for request in requests])
        if not all(bool(vector.isfinite().all()) for vector in vectors):
            raise VectorError("The model's numbers for this text are not finite.")
        return [vector.numpy().astype("<f4").tobytes() for vector in vectors]

    def _finish(self, texts: Sequence[Text], vectors: Sequence[bytes]) -> tuple[list[Embedded], list[TokenEvent]]:
        by_request: dict[int, list[tuple[int, bytes]]] = {}
        for text, vector in zip(texts, vectors, strict=True):
            by_request.setdefault(text.request_id, []).append((text.position, vector))
        events: list[TokenEvent] = []
        for request_id, found in by_request.items():
            live = self._live[request_id]
            live.missing -= len(found)
            if not live.missing:
                del self._live[request_id]
                events.append(TokenEvent(request_id, finish="stop"))
        embedded = [
            Embedded(request_id, tuple(place for place, _ in found), tuple(vector for _, vector in found))
            for request_id, found in by_request.items()
        ]
        return embedded, events

    def _fail(self, request_id: int, reason: str) -> TokenEvent:
        del self._live[request_id]
        self._scheduler.remove(request_id)
        return TokenEvent(request_id, error=reason)
