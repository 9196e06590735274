"""Filters of personal data: of input before anything stores it, of output before anything sees it.

The output filter is an Engine around an Engine, so it stands between the model and everything that stores or sends text
(cache, memory, LangChain callbacks, wire).  A filter that fails, fails closed: input is refused with 503, and a
completion ends with FinishReason.CONTENT_FILTER without the text that was being looked at.
"""

from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

import structlog
from msgspec import structs

from app.engine.base import Engine
from app.engine.logprob_alignment import DeltaAlignment, shared_beginning
from app.engine.stop_strings import StopBuffer, hidden_stops, with_stop_tokens
from app.engine.wrapper import EngineWrapper
from app.errors import InvalidRequest, PiiBlocked, ServiceUnavailable
from app.events import Delta, Event, Finished, Started, finish
from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redaction, Redactor, StreamRedactor
from app.privacy.unmasked_prompt import UnmaskedPrompt
from app.requests import GenerationRequest
from app.types import FinishReason, Usage

log = structlog.get_logger(__name__)

OnMatch = Callable[[PiiKind, int], None]
_FAILED = "The filter for personal data failed; nothing was processed."


class InputFilter:
    """Masks or refuses personal data in what a client sends."""

    def __init__(
        self,
        redactor: Redactor,
        mode: Literal["mask", "block"],
        on_match: OnMatch,
        *,
        pool: RedactionPool | None = None,
    ) -> None:
        """
        Args:
            on_match: called with each kind found and how often.
            pool: redacts with `redactor` where long texts hold up nothing; by default segment by segment on this loop.
        """
        self._pool = pool or RedactionPool(redactor)
        self._mode = mode
        self._on_match = on_match

    async def clean(self, tenant: Hashable, texts: Sequence[str]) -> list[str]:
        """Return the texts without personal data; `tenant` is whose turn among the long texts of all it takes.

        Raises:
            PiiBlocked: the policy is to block, and there is some; names the kinds, never the text.
            ServiceUnavailable: the filter itself failed.
        """
        redactions = await self._redact(tenant, texts)
        kinds = sorted({kind for redaction in redactions for kind in redaction.counts})
        for redaction in redactions:
            for kind, count in redaction.counts.items():
                self._on_match(kind, count)
        if kinds and self._mode == "block":
            raise PiiBlocked("The request holds personal data, which this service refuses.", details={"kinds": kinds})
        return [redaction.text for redaction in redactions]

    async def mask(self, tenant: Hashable, text: str, *, cut: bool = False) -> str:
        """Return a text as it would look had it come in, whatever the policy: stored turns are compared with that.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        Raises: ServiceUnavailable: the filter itself failed.
        """
        return (await self._redact(tenant, [text], cut=cut))[0].text

    async def _redact(self, tenant: Hashable, texts: Sequence[str], *, cut: bool = False) -> list[Redaction]:
        try:
            return [await self._pool.redact(tenant, text, cut=cut) for text in texts]
        except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
            # The traceback could show the very text, so only the fact is logged.
            log.error("input filter failed")
            raise ServiceUnavailable(_FAILED) from None


class _UnmaskedLogprobs:
    """Releases the log-probabilities of a sample's tokens as long as its clean text is the model's own.

    The tokens of a masked entity would reveal it, and so would their alternatives; the first mask ends them for the
    whole sample.
    """

    def __init__(self) -> None:
        self._alignment = DeltaAlignment()
        self._raw = ""
        """Text of the model that the filter has not released."""
        self._ended = False

    def release(self, delta: Delta, clean: str) -> Delta:
        """Return the clean delta that follows from the model's, and what may be known of its tokens."""
        if self._ended:
            return Delta(text=clean, tokens=delta.tokens)
        self._alignment.follow(delta)
        self._raw += delta.text
        same = shared_beginning(self._raw, clean)
        self._ended = same < len(clean)
        self._raw = self._raw[same:]
        logprobs, ends = self._alignment.release(same)
        return Delta(text=clean, tokens=delta.tokens, logprobs=logprobs, token_ends=ends)


class _OutputFilter:
    """Filters the text of one completion, and ends it at a stop string of the filtered text.

    A stop string that matched the model's own text would tell, by ending the completion, what stands under a mask.
    """

    def __init__(self, redactor: Redactor, request: GenerationRequest, pool: RedactionPool) -> None:
        self._pool = pool
        self._tenant = request.tenant
        self.redactor = StreamRedactor(redactor, _continued_text(request))
        self._stops = StopBuffer(request.sampling.stop)
        self._logprobs = None if request.sampling.logprobs is None else _UnmaskedLogprobs()
        self.prompt = UnmaskedPrompt(redactor, request, pool)

    @property
    def stopped(self) -> str | None:
        """Return the stop string that ended the completion; None before there is one."""
        return self._stops.matched

    async def feed(self, delta: Delta) -> Delta:
        text = await self._pool.feed(self._tenant, self.redactor, delta.text)
        return self._clean(delta, self._stops.feed(text))

    def finish(self, *, cut: bool) -> Delta:
        """Return what is still withheld.  Args: cut: whether the completion breaks off."""
        rest = self._stops.feed(self.redactor.finish(cut=cut))
        return self._clean(Delta(), rest + self._stops.finish())

    def _clean(self, delta: Delta, text: str) -> Delta:
        if self._logprobs is None:
            return Delta(text=text, tokens=delta.tokens)
        return self._logprobs.release(delta, text)


def _continued_text(request: GenerationRequest) -> str:
    """Return the end of the prompt that the completion continues; empty for the beginning of a turn."""
    if request.is_chat:
        return request.messages[-1].content if request.continue_final_message else ""
    return request.text or ""


class FilteredEngine(EngineWrapper):
    """Masks personal data in every completion of the inner engine."""

    def __init__(
        self, inner: Engine, redactor: Redactor, on_match: OnMatch, *, pool: RedactionPool | None = None
    ) -> None:
        """
        Args:
            on_match: called with each kind found and how often, once a completion has ended.
            pool: redacts with `redactor` where long deltas hold up nothing; by default segment by segment on this loop.
        """
        super().__init__(inner)
        self._pool = pool or RedactionPool(redactor)
        self._redactor = redactor
        self._on_match = on_match

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self._check_stop_tokens(request)
        output = _OutputFilter(self._redactor, request, self._pool)
        try:
            hidden = hidden_stops(request.sampling, self._inner) if request.sampling.stop else {}
            async with aclosing(self._inner.stream(_without_stops(request, hidden))) as events:
                async for event in events:
                    try:
                        released = await _filtered(_with_stop_string(event, request, hidden), output)
                    except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
                        # The traceback could show the very text, so only the place is logged.
                        log.error("output filter failed", request_id=request.id)
                        if isinstance(event, Started):
                            raise ServiceUnavailable(_FAILED) from None
                        yield finish(FinishReason.CONTENT_FILTER, _usage(request))
                        return
                    for each in released:
                        yield each
                    if output.stopped is not None:
                        break
            if output.stopped is not None:
                yield finish(FinishReason.STOP, _usage(request), output.stopped)
        finally:
            for kind, count in output.redactor.counts.items():
                self._on_match(kind, count)

    def _check_stop_tokens(self, request: GenerationRequest) -> None:
        """Raises: InvalidRequest: a stop token is text, and by ending the completion could tell what is masked."""
        for token_id in request.sampling.stop_token_ids:
            # Twice: the token that begins every prompt counts as one of its text only in the first place.
            if not self._inner.has_control_tokens((token_id, token_id)):
                raise InvalidRequest.of_field(
                    "stop_token_ids", "may only name control tokens where completions are filtered; use stop for texts"
                )


async def _filtered(event: Event, output: _OutputFilter) -> list[Event]:
    """Return what may be sent of an event; the last one is left out where a stop string ended the completion."""
    if isinstance(event, Started):
        return [await output.prompt.begin(event)]
    if isinstance(event, Delta):
        return [await (output.prompt.feed(event.prompt_logprobs) if event.prompt_logprobs else output.feed(event))]
    end = event.samples[0]
    rest = output.finish(cut=end.breaks_off)
    shown: list[Event] = [rest] if rest.text or rest.logprobs else []
    return shown if output.stopped is not None else [*shown, event]


def _without_stops(request: GenerationRequest, hidden: Mapping[int, str]) -> GenerationRequest:
    """Return the request without its stop strings, but for the tokens that they name: those are under no mask."""
    if not request.sampling.stop:
        return request
    sampling = with_stop_tokens(replace(request.sampling, stop=()), hidden)
    # Deltas as they are generated, or the stop string would be found when max_tokens had been.
    return structs.replace(request, sampling=sampling, stream=True)


def _with_stop_string(event: Event, request: GenerationRequest, hidden: Mapping[int, str]) -> Event:
    """Return the last event with the stop string that the caller knows in the place of its token."""
    if not isinstance(event, Finished) or not hidden:
        return event
    (end,) = event.samples
    if not isinstance(end.stop_reason, int) or end.stop_reason in request.sampling.stop_token_ids:
        return event
    return structs.replace(event, samples=(structs.replace(end, stop_reason=hidden[end.stop_reason]),))


def _usage(request: GenerationRequest) -> Usage:
    progress = request.progress
    return Usage(request.prompt_tokens, progress.generated, progress.cached)
