"""Filters of personal data: of input before anything stores it, of output before anything sees it.

The output filter is an Engine around an Engine, so it stands between the model and everything that stores or sends text
(cache, memory, LangChain callbacks, wire).  A filter that fails, fails closed: input is refused with 503, and a
completion ends with FinishReason.CONTENT_FILTER without the text that was being looked at.
"""

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Literal

import structlog
from msgspec import structs

from app.engine.base import Engine
from app.engine.logprob_alignment import DeltaAlignment, shared_beginning
from app.engine.stop_strings import StopBuffer, hidden_stops, with_stop_tokens
from app.engine.wrapper import EngineWrapper
from app.errors import InvalidRequest, PiiBlocked, ServiceUnavailable
from app.events import Delta, Event, Finished, Started, ToolCallDelta, finish
from app.privacy.json_redactor import JsonRedactor, TaggedRedactor
from app.privacy.pool import RedactionPool
from app.privacy.redactor import CONTINUED_CHARS, PiiKind, Redaction, Redactor, StreamRedactor
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


class _TextChannel:
    """One of the texts of a completion, which are redacted apart: the answer, the reasoning."""

    def __init__(self, redactor: Redactor, pool: RedactionPool, tenant: Hashable, before: str = "") -> None:
        """Args: before: the text that it continues."""
        self._redactor, self._pool, self._tenant = redactor, pool, tenant
        self._stream = StreamRedactor(redactor, before)
        self._tail = before[-CONTINUED_CHARS:]
        self._earlier: Counter[PiiKind] = Counter()

    @property
    def counts(self) -> dict[PiiKind, int]:
        return dict(self._earlier + Counter(self._stream.counts))

    async def feed(self, text: str) -> str:
        return self._seen(await self._pool.feed(self._tenant, self._stream, text))

    def finish(self, *, cut: bool = False) -> str:
        return self._seen(self._stream.finish(cut=cut))

    def pause(self) -> str:
        """Return what is withheld, since another text begins; of an entity that goes on later the rest is masked."""
        rest = self.finish()
        self._earlier.update(self._stream.counts)
        self._stream = StreamRedactor(self._redactor, self._tail)
        return rest

    def _seen(self, text: str) -> str:
        self._tail = (self._tail + text)[-CONTINUED_CHARS:]
        return text


class _OutputFilter:
    """Filters the texts of one completion, and ends it at a stop string of its filtered answer.

    A stop string that matched the model's own text would tell, by ending the completion, what stands under a mask.
    """

    def __init__(self, redactor: Redactor, request: GenerationRequest, pool: RedactionPool) -> None:
        self._json = partial(JsonRedactor, redactor, pool, request.tenant)
        self._text: _TextChannel | JsonRedactor | TaggedRedactor
        grammar = request.sampling.grammar
        if grammar is not None and grammar.is_json:
            self._text = self._json()
        elif grammar is not None and grammar.json_marks:
            self._text = TaggedRedactor(redactor, pool, request.tenant, grammar.json_marks)
        else:
            self._text = _TextChannel(redactor, pool, request.tenant, _continued_text(request))
        self._reasoning = _TextChannel(redactor, pool, request.tenant)
        self._calls: dict[int, JsonRedactor] = {}
        self._reasons = self._speaks = False
        """Whether the reasoning, and the answer, may have withheld text."""
        self._stops = StopBuffer(request.sampling.stop)
        self._logprobs = None if request.sampling.logprobs is None else _UnmaskedLogprobs()
        self.prompt = UnmaskedPrompt(redactor, request, pool)

    @property
    def stopped(self) -> str | None:
        """Return the stop string that ended the completion; None before there is one."""
        return self._stops.matched

    @property
    def counts(self) -> Counter[PiiKind]:
        """Return how many entities of each kind were replaced so far."""
        total: Counter[PiiKind] = Counter()
        for channel in (self._text, self._reasoning, *self._calls.values()):
            total.update(channel.counts)
        return total

    async def feed(self, delta: Delta) -> Delta:
        text = self._stops.feed(await self._text.feed(delta.text)) if delta.text else ""
        reasoning = await self._reasoning.feed(delta.reasoning) if delta.reasoning else ""
        self._reasons = self._reasons or bool(delta.reasoning)
        if self._reasons and (delta.text or delta.tool_calls):
            reasoning, self._reasons = reasoning + self._reasoning.pause(), False
        self._speaks = self._speaks or bool(delta.text)
        if self._speaks and delta.tool_calls and isinstance(self._text, _TextChannel):
            text, self._speaks = text + self._stops.feed(self._text.pause()) + self._stops.finish(), False
            if self.stopped is not None:
                return self._clean(delta, text, reasoning, ())
        calls = [await self._filtered_call(each) for each in delta.tool_calls]
        return self._clean(delta, text, reasoning, tuple(calls))

    def finish(self, *, cut: bool) -> Delta:
        """Return what is still withheld.  Args: cut: whether the completion breaks off."""
        rest = self._stops.feed(self._text.finish(cut=cut))
        calls = {position: call.finish(cut=cut) for position, call in self._calls.items()}
        return self._clean(
            Delta(),
            rest + self._stops.finish(),
            self._reasoning.finish(cut=cut),
            tuple(ToolCallDelta(position=at, arguments=text) for at, text in calls.items() if text),
        )

    async def _filtered_call(self, part: ToolCallDelta) -> ToolCallDelta:
        call = self._calls.setdefault(part.position, self._json())
        return structs.replace(part, arguments=await call.feed(part.arguments))

    def _clean(self, delta: Delta, text: str, reasoning: str, calls: tuple[ToolCallDelta, ...]) -> Delta:
        # The tokens of reasoning and of calls are none of the answer's, and would show what is masked there.
        own = not (delta.reasoning or delta.tool_calls)
        if self._logprobs is None:
            clean = Delta(text=text, tokens=delta.tokens)
        else:
            unfiltered = delta if own else structs.replace(delta, logprobs=(), token_ends=())
            clean = self._logprobs.release(unfiltered, text)
        return structs.replace(clean, reasoning=reasoning, tool_calls=calls) if reasoning or calls else clean


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
                    began = time.perf_counter()
                    try:
                        released = await _filtered(_with_stop_string(event, request, hidden), output)
                    except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
                        # The traceback could show the very text, so only the place is logged.
                        log.error("output filter failed", request_id=request.id)
                        if isinstance(event, Started):
                            raise ServiceUnavailable(_FAILED) from None
                        yield finish(FinishReason.CONTENT_FILTER, _usage(request))
                        return
                    request.progress.times.filter_seconds += time.perf_counter() - began
                    for each in released:
                        yield each
                    if output.stopped is not None:
                        break
            if output.stopped is not None:
                yield finish(FinishReason.STOP, _usage(request), output.stopped)
        finally:
            for kind, count in output.counts.items():
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
    shown: list[Event] = [rest] if rest.is_visible else []
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
