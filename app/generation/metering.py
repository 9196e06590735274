"""Usage recording: charges a request to its caller's quota, and writes its row of the inference log."""

import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import UTC, datetime
from typing import Protocol

from app.embeddings import EmbeddingRequest
from app.engine.base import EngineInfo
from app.errors import AppError, EngineBusy
from app.events import Delta, Event, Finished
from app.generation.context_window import FittedPrompt
from app.generation.request_stats import RequestStats
from app.requests import GenerationRequest
from app.types import InferenceRecord, Principal

_CLIENT_GONE = 499


class Reservation(Protocol):
    """Tokens that are set aside for a request."""

    @property
    def counted(self) -> bool:
        """Return whether the quota has counted them."""

    async def lower(self, tokens: int) -> None:
        """Put back what is set aside beyond so many: the request cannot take more."""

    def commit(self, tokens: int) -> None:
        """Note what was really used; the rest is released when the reservation ends."""


class Admission(Protocol):
    """Knows what a caller may do and how much; `access.AdmissionControl` is it."""

    def check_rights(
        self, principal: Principal, *, model: str, logprobs: bool, system_text: str | None, control_tokens: bool
    ) -> None:
        """Raises: Forbidden: the caller's role does not allow this model, or what else the request uses of it."""

    async def check_tokens(self, principal: Principal, tokens: int) -> None:
        """Refuse a request that takes at least so many tokens before any work is done for it.

        Raises: QuotaExceeded: so many are not left, as far as is known without taking them.
        """

    def reserve(
        self, principal: Principal, tokens: int, count: Callable[[], Awaitable[int]] | None = None
    ) -> AbstractAsyncContextManager[Reservation]:
        """Set tokens aside while the context lasts.

        Args: count: tells how many are needed at most where `tokens` may be too many; None: it is not.
        Raises: RateLimited, QuotaExceeded: so many are not left; then nothing is taken.
        """


class InferenceLog(Protocol):
    """A queue of rows for the inference log."""

    def write(self, record: InferenceRecord) -> None:
        """Queue a record without waiting."""


class UsageRecorder:
    """Opens a record for each request; lives as long as the application."""

    def __init__(
        self,
        *,
        log: InferenceLog,
        cached_prompt: float,
        cached_completion: float,
        store_text: bool,
    ) -> None:
        """Args:
        cached_prompt, cached_completion: the share of its tokens that a replayed response costs, 0 to 1.
        store_text: put prompt and completion into the records.
        """
        self.cached_prompt = cached_prompt
        self.cached_completion = cached_completion
        self.store_text = store_text
        self._log = log

    @contextmanager
    def record(self, request: GenerationRequest | EmbeddingRequest, principal: Principal) -> Iterator["UsageRecord"]:
        """Follow one request and write its record at the end, unless it is only an attempt that comes again."""
        record = UsageRecord(self, request, principal)
        try:
            yield record
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            if not record.comes_again:
                self._log.write(record.row())


class UsageRecord:
    """Collects the usage of one request while it runs, for its row in the log."""

    def __init__(
        self, recorder: UsageRecorder, request: GenerationRequest | EmbeddingRequest, principal: Principal
    ) -> None:
        self._recorder = recorder
        self._request = request
        self._principal = principal
        self._created = datetime.now(UTC)
        self._began = time.monotonic()
        self._info: EngineInfo | None = None
        self._adapter: str | None = None
        self._stats: RequestStats | None = None
        self._prompt_tokens = 0
        self._counted = False
        self._charged = 0
        self._status = 200
        self._busy = False
        self._finished: Finished | None = None
        self._prompt: str | None = None
        self._completions: defaultdict[int, list[str]] = defaultdict(list)

    @property
    def comes_again(self) -> bool:
        """Return whether a full engine refused an attempt of several, which cost nothing."""
        return self._busy and self._request.origin.retried and not self._charged

    def begin(self, info: EngineInfo, fitted: FittedPrompt) -> None:
        """Note the model and the prompt as it was fitted: filtered, and without the history of its session."""
        self._info, self._prompt_tokens = info, 0 if fitted.is_upper_bound else fitted.prompt_tokens
        self._adapter = fitted.request.adapter
        if self._recorder.store_text:
            texts = [message.all_text for message in fitted.new] or [fitted.request.text or ""]
            self._prompt = "\n\n".join(texts)

    def begin_texts(self, info: EngineInfo, tokens: int, texts: Iterable[str]) -> None:
        """Note the model and the texts that it embeds, as they were filtered."""
        self._info, self._prompt_tokens = info, tokens
        if self._recorder.store_text:
            self._prompt = "\n\n".join(texts)

    @contextmanager
    def charge_texts(self, request: EmbeddingRequest, reservation: Reservation) -> Iterator[None]:
        """Charge the tokens of the texts that were embedded, however the request ends."""
        self._counted = reservation.counted
        try:
            yield
        finally:
            self._charged = request.progress.computed
            reservation.commit(self._charged)

    @contextmanager
    def charge(self, stats: RequestStats, reservation: Reservation) -> Iterator[None]:
        """Charge what the samples cost to the reservation, however they end."""
        self._stats, self._counted = stats, reservation.counted
        try:
            yield
        except AppError as error:
            stats.fail(error)
            raise
        finally:
            # Of a request that ends early the engine may have told what nobody had counted.
            self._prompt_tokens = self._prompt_tokens or stats.prompt_tokens
            stats.close(self._prompt_tokens)
            self._charged = self._cost(stats)
            reservation.commit(self._charged)

    def _cost(self, stats: RequestStats) -> int:
        """Return the tokens to charge: the prompt once it was scored or a token was generated, and every such token.

        What another request's generation has computed, prompt or tokens, costs the share of a cached response.
        """
        recorder, generated, replayed = self._recorder, stats.generated, stats.replayed
        seen = generated or replayed or stats.received_prompt
        prompt = 1.0 if stats.computed_prompt else recorder.cached_prompt if seen else 0.0
        return math.ceil(prompt * self._prompt_tokens + generated + recorder.cached_completion * replayed)

    def observe(self, event: Event) -> None:
        """Keep the text that the caller receives, if texts are logged, and the prompt's length as the engine has it."""
        if isinstance(event, Finished):
            # Before that it may have been an estimate.
            self._prompt_tokens = event.usage.prompt_tokens or self._prompt_tokens
        elif isinstance(event, Delta) and self._recorder.store_text:
            self._completions[event.index].append(event.all_text)

    def finish(self, finished: Finished) -> None:
        """Record that the response is complete: all that is left is to yield this event."""
        self._finished = finished

    def fail(self, error: BaseException) -> None:
        """Record what ended the request; a client that leaves once its response is complete is no failure."""
        if self._finished is not None:
            return
        self._busy = isinstance(error, EngineBusy)
        if isinstance(error, AppError):
            self._status = error.status
        else:
            self._status = 500 if isinstance(error, Exception) else _CLIENT_GONE

    def row(self) -> InferenceRecord:
        """Return everything that is known now."""
        request, info, stats, finished = self._request, self._info, self._stats, self._finished
        first = stats.first_token_seconds if stats else None
        answer, cut_at = self._completion_text()
        return InferenceRecord(
            created=self._created,
            request_id=request.origin.request_id or request.id,
            key_id=self._principal.key_id,
            route=request.origin.route,
            model=info.model if info else None,
            revision=info.revision if info else None,
            adapter=self._adapter,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=stats.generated + stats.replayed if stats else 0,
            charged_tokens=self._charged,
            counted=self._counted,
            cached=finished.cached if finished else False,
            finish_reason=finished.finish_reason if finished else None,
            status=self._status,
            first_token_ms=None if first is None else round(1000 * first, 3),
            latency_ms=round(1000 * (time.monotonic() - self._began), 3),
            prompt=self._prompt,
            answer=answer,
            cut_at=cut_at,
        )

    def _completion_text(self) -> tuple[str | None, tuple[int, ...]]:
        """Return the samples as one text, and where those end that broke off."""
        if not self._recorder.store_text:
            return None, ()
        text, cut_at = "", list[int]()
        for index in sorted(self._completions):
            text += "\n\n" * bool(text) + "".join(self._completions[index])
            if self._finished is None or self._finished.samples[index].breaks_off:
                cut_at.append(len(text))
        return text, tuple(cut_at)
