"""Filters of personal data: of input before anything stores it, of output before anything sees it.

The output filter is an Engine around an Engine, so it stands between the model and everything that stores or sends text
(cache, memory, LangChain callbacks, wire).  A filter that fails, fails closed: input is refused with 503, and a
completion ends with FinishReason.CONTENT_FILTER without the text that was being looked at.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Literal

import structlog

from app.engine.base import Engine
from app.engine.logprob_alignment import DeltaAlignment
from app.engine.wrapper import EngineWrapper
from app.errors import PiiBlocked, ServiceUnavailable
from app.events import Delta, Event, Finished, finish
from app.privacy.redactor import PiiKind, Redaction, Redactor, StreamRedactor
from app.requests import GenerationRequest
from app.types import FinishReason, Usage

log = structlog.get_logger(__name__)

OnMatch = Callable[[PiiKind, int], None]

THREAD_CHARS = 2000
"""Longer texts are worked on in a thread: they would hold up every other request of the event loop."""


class InputFilter:
    """Masks or refuses personal data in what a client sends."""

    def __init__(self, redactor: Redactor, mode: Literal["mask", "block"], on_match: OnMatch) -> None:
        """Args: on_match: called with each kind found and how often."""
        self._redactor = redactor
        self._mode = mode
        self._on_match = on_match

    async def clean(self, texts: Sequence[str]) -> list[str]:
        """Return the texts without personal data.

        Raises:
            PiiBlocked: the policy is to block, and there is some; names the kinds, never the text.
            ServiceUnavailable: the filter itself failed.
        """
        redactions = await self._redact(texts)
        kinds = sorted({kind for redaction in redactions for kind in redaction.counts})
        for redaction in redactions:
            for kind, count in redaction.counts.items():
                self._on_match(kind, count)
        if kinds and self._mode == "block":
            raise PiiBlocked("The request holds personal data, which this service refuses.", details={"kinds": kinds})
        return [redaction.text for redaction in redactions]

    async def mask(self, text: str) -> str:
        """Return a text as it would look had it come in, whatever the policy: stored turns are compared with that.

        Raises: ServiceUnavailable: the filter itself failed.
        """
        return (await self._redact([text]))[0].text

    async def _redact(self, texts: Sequence[str]) -> list[Redaction]:
        def redact() -> list[Redaction]:
            return [self._redactor.redact(text) for text in texts]

        try:
            long = sum(map(len, texts)) > THREAD_CHARS
            return await asyncio.to_thread(redact) if long else redact()
        except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
            # The traceback could show the very text, so only the fact is logged.
            log.error("input filter failed")
            raise ServiceUnavailable("The filter for personal data failed; nothing was processed.") from None


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
        same = _shared_beginning(self._raw, clean)
        self._ended = same < len(clean)
        self._raw = self._raw[same:]
        logprobs, ends = self._alignment.release(same)
        return Delta(text=clean, tokens=delta.tokens, logprobs=logprobs, token_ends=ends)


def _shared_beginning(one: str, other: str) -> int:
    """Return how many characters two texts have in common before they differ."""
    differing = (at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
    return next(differing, min(len(one), len(other)))


class FilteredEngine(EngineWrapper):
    """Masks personal data in every completion of the inner engine."""

    def __init__(self, inner: Engine, redactor: Redactor, on_match: OnMatch) -> None:
        """Args: on_match: called with each kind found and how often, once a completion has ended."""
        super().__init__(inner)
        self._redactor = redactor
        self._on_match = on_match

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        redactor = StreamRedactor(self._redactor)
        logprobs = None if request.sampling.logprobs is None else _UnmaskedLogprobs()

        def clean(delta: Delta, *, last: bool = False) -> Delta:
            text = redactor.finish() if last else redactor.feed(delta.text)
            return Delta(text=text, tokens=delta.tokens) if logprobs is None else logprobs.release(delta, text)

        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    try:
                        if isinstance(event, Delta):
                            long = len(event.text) > THREAD_CHARS
                            event = await asyncio.to_thread(clean, event) if long else clean(event)
                        elif isinstance(event, Finished) and (rest := clean(Delta(), last=True)).text:
                            yield rest
                    except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
                        # The traceback could show the very text, so only the place is logged.
                        log.error("output filter failed", request_id=request.id)
                        usage = Usage(request.prompt_tokens, request.progress.generated)
                        yield finish(FinishReason.CONTENT_FILTER, usage)
                        return
                    yield event
        finally:
            # A list: where the stream was abandoned, a thread may still be counting.
            for kind, count in list(redactor.counts.items()):
                self._on_match(kind, count)
