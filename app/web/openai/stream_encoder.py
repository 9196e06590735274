"""Encodes OpenAI's streams: chunks without event names, errors as objects, and `[DONE]` at the end."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

from app.errors import AppError, ShuttingDown
from app.events import Delta, Event, Finished, FinishedSample, Started, ToolCallDelta
from app.types import FinishReason, Usage
from app.web.http.sse import frame
from app.web.http.tool_calls import tool_call_deltas
from app.web.openai import errors
from app.web.openai.response_objects import (
    ObjectMetadata,
    TextLogprobs,
    chat_finish_fields,
    chat_logprobs,
    finish_fields,
    reasoning_fields,
    tokens_object,
    usage_object,
)

DONE = b"data: [DONE]\n\n"


class StreamUsage(Enum):
    """When a stream reports token usage."""

    NEVER = auto()
    FINAL = auto()
    """One additional last chunk, without choices, has the usage."""
    CONTINUOUS = auto()
    """Like FINAL, and every chunk has the usage of its choice so far."""


def was_aborted(finished: Finished) -> bool:
    """Return whether the service aborted the generation, for which OpenAI has no finish reason."""
    return any(sample.finish_reason is FinishReason.ABORT for sample in finished.samples)


class ChoiceEncoder(Protocol):
    """Builds the choice objects of one kind of stream."""

    kind: str
    path: str
    """The route's path, for error envelopes."""

    def first(self, index: int, started: Started) -> dict[str, Any] | None:
        """Return the choice before any text, or None if the stream has no such chunk."""

    def delta(self, delta: Delta) -> dict[str, Any]:
        """Return the choice of a text delta."""

    def last(self, index: int, sample: FinishedSample) -> dict[str, Any]:
        """Return the choice with its finish reason."""


class ChunkStreamEncoder:
    """Encodes a generation as chunks with one choice each; a `StreamEncoder`."""

    def __init__(self, metadata: ObjectMetadata, choices: ChoiceEncoder, *, n: int, stream_usage: StreamUsage) -> None:
        """Args: n: choices of each prompt."""
        self._metadata = metadata
        self._choices = choices
        self._n = n
        self._stream_usage = stream_usage
        self._so_far: dict[int, Usage] = {}
        """Usage of each choice so far, prompt included; its completion is counted only where each chunk has it."""

    def encode(self, event: Event) -> bytes:
        match event:
            case Started():
                return self._begin(event)
            case Delta():
                usage = self._so_far[event.index]
                if self._stream_usage is StreamUsage.CONTINUOUS:
                    usage = replace(usage, completion_tokens=usage.completion_tokens + event.tokens)
                    self._so_far[event.index] = usage
                return self._chunk(self._choices.delta(event), usage)
            case Finished():
                return self._end(event)

    def encode_error(self, error: AppError) -> bytes:
        return frame(errors.envelope(error, self._choices.path)) + DONE

    def _begin(self, started: Started) -> bytes:
        chunks = []
        for index in range(started.index, started.index + self._n):
            usage = self._so_far[index] = Usage(started.prompt_tokens, 0)
            if (first := self._choices.first(index, started)) is not None:
                chunks.append(self._chunk(first, usage))
        return b"".join(chunks)

    def _end(self, finished: Finished) -> bytes:
        if was_aborted(finished):
            return self.encode_error(ShuttingDown())
        chunks = []
        for index, sample in enumerate(finished.samples):
            usage = replace(self._so_far[index], completion_tokens=sample.completion_tokens)
            chunks.append(self._chunk(self._choices.last(index, sample), usage))
        if self._stream_usage is not StreamUsage.NEVER:
            chunks.append(frame(self._metadata.object(self._choices.kind, [], usage_object(finished))))
        return b"".join((*chunks, DONE))

    def _chunk(self, choice: dict[str, Any], so_far: Usage) -> bytes:
        usage = tokens_object(so_far) if self._stream_usage is StreamUsage.CONTINUOUS else None
        chunk = self._metadata.object(self._choices.kind, [choice], usage)
        if self._stream_usage is StreamUsage.NEVER:
            del chunk["usage"]
        return frame(chunk)


class ChatChoiceEncoder:
    """Builds chat.completion.chunk choices: the role, then deltas of content, reasoning and calls, then the finish."""

    kind, path = "chat.completion.chunk", "/v1/chat/completions"

    def __init__(self, *, with_logprobs: bool, as_functions: bool = False) -> None:
        """Args: as_functions: whether a call is in the older form, of which there is only one."""
        self._with_logprobs = with_logprobs
        self._as_functions = as_functions

    def first(self, index: int, started: Started) -> dict[str, Any]:
        return _chat_choice(index, {"role": "assistant", "content": ""})

    def delta(self, delta: Delta) -> dict[str, Any]:
        choice = _chat_choice(delta.index, self._fields(delta))
        return {**choice, "logprobs": chat_logprobs(delta.logprobs)} if self._with_logprobs else choice

    def last(self, index: int, sample: FinishedSample) -> dict[str, Any]:
        return {**_chat_choice(index, {}), **chat_finish_fields(sample, as_functions=self._as_functions)}

    def _fields(self, delta: Delta) -> dict[str, Any]:
        if not (delta.reasoning or delta.tool_calls):
            return {"content": delta.text}
        fields: dict[str, Any] = reasoning_fields(delta.reasoning) if delta.reasoning else {}
        if delta.text:
            fields["content"] = delta.text
        if delta.tool_calls and self._as_functions:
            fields |= _function_call_delta(delta.tool_calls)
        elif delta.tool_calls:
            fields["tool_calls"] = tool_call_deltas(delta.tool_calls)
        return fields


class TextChoiceEncoder:
    """Builds text_completion choices: the echoed prompt if requested, then text deltas, then the finish reason."""

    kind, path = "text_completion", "/v1/completions"

    def __init__(self, *, logprobs: int | None, echo: bool) -> None:
        """Args: logprobs: alternatives to each token; None reports no log-probabilities."""
        self._with_logprobs = logprobs is not None
        self._echo = echo
        self._logprobs = defaultdict[int, TextLogprobs](partial(TextLogprobs, logprobs if echo else None))

    def first(self, index: int, started: Started) -> dict[str, Any] | None:
        return _text_choice(index, started.prompt or "") if self._echo else None

    def delta(self, delta: Delta) -> dict[str, Any]:
        choice = _text_choice(delta.index, delta.text)
        if not self._with_logprobs:
            return choice
        logprobs = self._logprobs[delta.index]
        if delta.prompt_logprobs:  # their text is in the first chunk
            return {**choice, "logprobs": logprobs.next_prompt_object(delta.prompt_logprobs)}
        return {**choice, "logprobs": logprobs.next_object(delta.logprobs)}

    def last(self, index: int, sample: FinishedSample) -> dict[str, Any]:
        return {**_text_choice(index, ""), **finish_fields(sample)}


def _function_call_delta(parts: Sequence[ToolCallDelta]) -> dict[str, Any]:
    first = [part for part in parts if part.position == 0]
    if not first:
        return {}
    name = next(({"name": part.name} for part in first if part.name is not None), {})
    return {"function_call": {**name, "arguments": "".join(part.arguments for part in first)}}


def _chat_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
