"""Turns the chunks of one remote completion into events: its text, its calls, its tokens and how it ended.

What the server does not say is made up for here: which stop string matched, how many tokens there were, why it ended.
"""

import codecs
from collections.abc import Mapping
from typing import Final
from uuid import uuid4

from msgspec import structs

from app.engine.logprob_alignment import LogprobAlignment
from app.engine.remote.chunks import CallPart, Choice, Chunk, UsagePart, argument_text, logprobs_of
from app.engine.stop_strings import StopBuffer
from app.errors import EngineFailed
from app.events import Delta, DetokenizedLogprob, Finished, FinishedSample, ToolCallDelta
from app.requests import GenerationRequest
from app.types import FinishReason, Usage

TYPICAL_BYTES_PER_TOKEN, MOST_BYTES_PER_TOKEN = 4, 8
"""Of a completion whose server counts nothing: with more bytes in a chunk than the second, it has several tokens."""

_REASONS: Final[Mapping[str, FinishReason]] = {
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}
"""All others are ends that the model came to by itself: stop, eos, eos_token, stop_sequence."""
_FAILURES: Final = frozenset(["abort", "cancelled", "error"])
_NOTHING: Final = Delta()


class RemoteCompletion:
    """Collects one completion."""

    def __init__(self, request: GenerationRequest, *, names_stops: bool) -> None:
        """Args: names_stops: whether the server ends it at stop strings, and says at which."""
        self._request = request
        self._stops = StopBuffer(() if names_stops else request.sampling.stop)
        self._logprobs = _Logprobs() if request.sampling.logprobs is not None else None
        self._calls = _Calls()
        self._usage = UsagePart()
        self._chunks = 0
        """Chunks with something of the model in them: tokens, as most servers send them."""
        self._scored = 0
        """Tokens with log-probabilities."""
        self._bytes = 0
        self._reported = 0
        """Tokens of the deltas returned so far."""
        self._reason: str | None = None
        self._stop_reason: str | int | None = None

    @property
    def matched(self) -> bool:
        """Return whether a stop string was found here, so that nothing more is wanted."""
        return self._stops.matched is not None

    @property
    def has_reason(self) -> bool:
        """Return whether the server said why it ended; only its usage may still come."""
        return self._reason is not None

    def feed(self, chunk: Chunk) -> Delta:
        """Return what a chunk adds.

        Raises: EngineFailed: the server says that it has failed.
        """
        if chunk.usage is not None:
            self._usage = chunk.usage
        # One completion is asked for.
        return self._counted(self._read(chunk.choices[0]) if chunk.choices else _NOTHING)

    def _read(self, choice: Choice) -> Delta:
        if choice.finish_reason:
            if choice.finish_reason in _FAILURES:
                raise EngineFailed("The model's server broke this answer off. Try again.")
            self._reason, self._stop_reason = choice.finish_reason, choice.stop_reason
        part, tokens = choice.part, logprobs_of(choice.logprobs, self._request.sampling.logprobs or 0)
        self._scored += len(tokens)
        given, reasoning = part.content or "", part.reasoning_content or part.reasoning or ""
        calls = self._calls.read(part.tool_calls) if part.tool_calls else ()
        text = self._stops.feed(given)
        if calls:
            # No stop string reaches from the answer into a call.
            text += self._stops.finish()
        self._bytes += len((given + reasoning + "".join(each.arguments for each in calls)).encode())
        self._chunks += bool(given or reasoning or calls)
        # Those of reasoning and of calls are none of the answer's.
        own = () if reasoning or calls else tokens
        scored, ends = self._logprobs.take(own, given, text) if self._logprobs else ((), ())
        return Delta(text=text, reasoning=reasoning, tool_calls=calls, logprobs=scored, token_ends=ends)

    def _counted(self, delta: Delta) -> Delta:
        progress = self._request.progress
        progress.generated = max(progress.generated, self._usage.completion_tokens or self._scored or self._chunks)
        progress.cached = self._usage.cached_tokens
        progress.prompt = self._usage.prompt_tokens or progress.prompt
        tokens, self._reported = progress.generated - self._reported, progress.generated
        return structs.replace(delta, tokens=tokens) if tokens else delta

    def finish(self, *, done: bool) -> tuple[Delta, Finished]:
        """Return what is left, and the last event.

        Args: done: whether the server said that the stream is over.
        Raises: EngineFailed: it ended before the completion did.
        """
        if not (done or self.has_reason or self.matched):
            raise EngineFailed("The model's server ended its stream in the middle of the answer. Try again.")
        text = self._stops.finish()
        scored, ends = self._logprobs.finish(text) if self._logprobs else ((), ())
        progress = self._request.progress
        if not self._usage.completion_tokens and not self._scored and self._bytes > MOST_BYTES_PER_TOKEN * self._chunks:
            progress.generated = self._bytes // TYPICAL_BYTES_PER_TOKEN
        delta = self._counted(Delta(text=text, logprobs=scored, token_ends=ends))
        return delta, self.end(self._finish_reason())

    def end(self, reason: FinishReason) -> Finished:
        """Return the last event of a completion that ends now."""
        generated = self._request.progress.generated
        sample = FinishedSample(
            finish_reason=reason,
            completion_tokens=generated,
            stop_reason=self._stops.matched or self._stop_reason,
            reasoning_tokens=min(self._usage.reasoning_tokens, generated),
        )
        prompt = self._usage.prompt_tokens or self._request.prompt_tokens
        return Finished(samples=(sample,), usage=Usage(prompt, generated, self._usage.cached_tokens))

    def _finish_reason(self) -> FinishReason:
        if self.matched:
            return FinishReason.STOP
        if self._reason is None and self._request.progress.generated >= self._request.sampling.max_tokens:
            return FinishReason.LENGTH
        reason = _REASONS.get(self._reason or "", FinishReason.STOP)
        return FinishReason.TOOL_CALLS if reason is FinishReason.STOP and self._calls.any else reason


class _Logprobs:
    """Places the tokens of one completion in the text that is let through."""

    def __init__(self) -> None:
        self._alignment = LogprobAlignment[DetokenizedLogprob]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._given = self._placed = 0
        """Characters of the text, and of that those whose tokens have come."""

    def take(
        self, tokens: tuple[DetokenizedLogprob, ...], given: str, text: str
    ) -> tuple[tuple[DetokenizedLogprob, ...], tuple[int, ...]]:
        """Return the tokens that end in the text that is let through, and where each does.

        Args: given: the text of these tokens, as the server sent it; text: what is let through now.
        """
        self._given += len(given)
        for token in tokens:
            # What a server shows of a token may be more than the text has of it: its own marks, a part of a character.
            part = self._decoder.decode(token.raw)[: self._given - self._placed]
            self._placed += len(part)
            self._alignment.add(part, token)
        # Text that no token has come for belongs to those that had none.
        self._alignment.add(" " * (self._given - self._placed), None)
        self._placed = self._given
        return self._alignment.release(len(text))

    def finish(self, text: str) -> tuple[tuple[DetokenizedLogprob, ...], tuple[int, ...]]:
        """Return the tokens of the rest."""
        self._alignment.finish()
        return self._alignment.release(len(text))


class _Calls:
    """Gives each call of a completion its position, id and name, once."""

    def __init__(self) -> None:
        self._positions: dict[tuple[int | None, str | None], int] = {}
        self._last = -1

    @property
    def any(self) -> bool:
        return self._last >= 0

    def read(self, parts: list[CallPart]) -> tuple[ToolCallDelta, ...]:
        return tuple(map(self._part, parts))

    def _part(self, part: CallPart) -> ToolCallDelta:
        name = part.function.name if part.function else None
        arguments = argument_text(part.function.arguments if part.function else None)
        if (position := self._known(part, bool(name))) is not None:
            return ToolCallDelta(position=position, arguments=arguments)
        self._last += 1
        self._positions[part.index, part.id] = self._positions[part.index, None] = self._last
        return ToolCallDelta(
            position=self._last, id=part.id or f"call_{uuid4().hex[:24]}", name=name or "", arguments=arguments
        )

    def _known(self, part: CallPart, named: bool) -> int | None:
        """Return the position of the call that a part continues; None for a new one.

        Some servers number all calls 0, or none, and repeat id and name in each part.
        """
        if part.id is not None:
            return self._positions.get((part.index, part.id))
        if part.index is not None:
            return self._positions.get((part.index, None))
        return None if named or self._last < 0 else self._last
