"""Where personal data is filtered: input before anything stores it, output before anything sees it.

The output filter is an Engine around an Engine, so it stands between the model and everything that keeps or sends text
(cache, memory, LangChain callbacks, wire).  A filter that fails, fails closed: input is refused with 503, and an answer
ends with FinishReason.CONTENT_FILTER without the text that was being looked at.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

import structlog

from app.engine.base import Chunk, Engine, GenerationRequest
from app.engine.logprob_alignment import TokenSpans
from app.engine.wrapper import EngineWrapper
from app.errors import PiiBlocked, ServiceUnavailable
from app.privacy.redactor import PiiKind, Redaction, Redactor, StreamRedactor
from app.types import FinishReason, Usage

log = structlog.get_logger(__name__)

OnMatch = Callable[[PiiKind, int], None]

THREAD_CHARS = 2000
"""Longer texts are worked on in a thread: they would hold up every other request of the event loop."""


class InputFilter:
    """Masks or refuses personal data in what a client sends."""

    def __init__(self, redactor: Redactor, mode: Literal["mask", "block"], on_match: OnMatch) -> None:
        """Args: on_match: told each kind found and how often."""
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
        """Return a text as it would look had it come in, whatever the policy: what is kept is compared with that.

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


class _Unmasked:
    """Lets out the log-probabilities of an answer's tokens as long as its clean text is the model's own.

    The tokens of a masked entity would tell it, and so would their alternatives; the first mask ends them for the
    whole answer.
    """

    def __init__(self) -> None:
        self._spans = TokenSpans()
        self._raw = ""
        """What the model said and the filter has not let out."""
        self._ended = False

    def see(self, chunk: Chunk, clean: str) -> Chunk:
        """Return the model's chunk with the clean text that comes of it, and what may be known of its tokens."""
        if self._ended:
            return replace(chunk, text=clean, logprobs=(), token_ends=())
        self._spans.follow(chunk)
        self._raw += chunk.text
        same = _shared_beginning(self._raw, clean)
        self._ended = same < len(clean)
        self._raw = self._raw[same:]
        logprobs, ends = self._spans.show(same)
        return replace(chunk, text=clean, logprobs=logprobs, token_ends=ends)


def _shared_beginning(one: str, other: str) -> int:
    """Return how many characters two texts have in common before they differ."""
    differing = (at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
    return next(differing, min(len(one), len(other)))


class FilteredEngine(EngineWrapper):
    """Masks personal data in every answer of the inner engine."""

    def __init__(self, inner: Engine, redactor: Redactor, on_match: OnMatch) -> None:
        """Args: on_match: told each kind found and how often, once an answer has ended."""
        super().__init__(inner)
        self._redactor = redactor
        self._on_match = on_match

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        redactor = StreamRedactor(self._redactor)
        unmasked = None if request.params.logprobs is None else _Unmasked()
        made = 0
        try:
            async with aclosing(self._inner.stream(request)) as chunks:
                async for chunk in chunks:
                    made += chunk.tokens
                    try:
                        clean = redactor.feed(chunk.text)
                        if chunk.finish_reason is not None:
                            clean += redactor.finish()
                    except Exception:  # noqa: BLE001  # whatever it is, the text must not pass
                        # The traceback could show the very text, so only the place is logged.
                        log.error("output filter failed", request_id=request.id)
                        usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=made)
                        yield Chunk(finish_reason=FinishReason.CONTENT_FILTER, usage=usage)
                        return
                    if unmasked is None:
                        yield replace(chunk, text=clean, logprobs=(), token_ends=())
                    else:
                        yield unmasked.see(chunk, clean)
        finally:
            for kind, count in redactor.counts.items():
                self._on_match(kind, count)
