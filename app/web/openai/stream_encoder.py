"""OpenAI's streams: chunks without event names, errors as objects, and `[DONE]` at the end of either."""

from collections import defaultdict
from dataclasses import replace
from enum import Enum, auto
from typing import Any, Protocol

from app.errors import AppError, ShuttingDown
from app.generation.requests import Delta, Ending, Event, Finished, Sampling, Started
from app.types import FinishReason, Usage
from app.web.http.sse import frame
from app.web.openai import errors
from app.web.openai.response_objects import (
    Head,
    TextLogprobs,
    chat_logprobs,
    ending_fields,
    tokens_object,
    usage_object,
)

DONE = b"data: [DONE]\n\n"


class UsageTold(Enum):
    """When a stream tells how many tokens there are."""

    NEVER = auto()
    AT_THE_END = auto()
    """In one more chunk, without choices."""
    ALWAYS = auto()
    """There, and in every chunk those of its choice so far."""


def is_cut_short(finished: Finished) -> bool:
    """Whether the service itself ended an answer early: no finish reason that clients know says that."""
    return any(ending.finish_reason is FinishReason.ABORT for ending in finished.endings)


class Choices(Protocol):
    """What a kind of answer says of each of its choices, piece by piece."""

    kind: str
    path: str
    """Where it is asked for."""

    def opening(self, index: int, started: Started) -> dict[str, Any] | None:
        """Return the first object of a choice, if it begins with one of its own."""

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return the object of a piece of text."""

    def closing(self, index: int, ending: Ending) -> dict[str, Any]:
        """Return the last object of a choice."""


class ChunkStream:
    """Writes a stream of chunks with one choice each; a `Dialect`."""

    def __init__(self, head: Head, choices: Choices, *, answers: int, usage_told: UsageTold) -> None:
        """Args: answers: choices that each prompt begins."""
        self._head = head
        self._choices = choices
        self._answers = answers
        self._usage_told = usage_told
        self._so_far: dict[int, Usage] = {}
        """Of each choice, with the tokens of its prompt."""

    def frames(self, event: Event) -> bytes:
        match event:
            case Started():
                return self._begin(event)
            case Delta():
                so_far = self._so_far[event.index]
                usage = replace(so_far, completion_tokens=so_far.completion_tokens + event.made)
                self._so_far[event.index] = usage
                return self._chunk(self._choices.piece(event), usage)
            case Finished():
                return self._end(event)

    def failure(self, error: AppError) -> bytes:
        return frame(errors.envelope(error, self._choices.path)) + DONE

    def _begin(self, started: Started) -> bytes:
        chunks = []
        for index in range(started.index, started.index + self._answers):
            usage = self._so_far[index] = Usage(started.prompt_tokens, 0)
            if (opening := self._choices.opening(index, started)) is not None:
                chunks.append(self._chunk(opening, usage))
        return b"".join(chunks)

    def _end(self, finished: Finished) -> bytes:
        if is_cut_short(finished):
            return self.failure(ShuttingDown())
        chunks = []
        for index, ending in enumerate(finished.endings):
            usage = replace(self._so_far[index], completion_tokens=ending.tokens)
            chunks.append(self._chunk(self._choices.closing(index, ending), usage))
        if self._usage_told is not UsageTold.NEVER:
            chunks.append(frame(self._head.object(self._choices.kind, [], usage_object(finished.usage))))
        return b"".join((*chunks, DONE))

    def _chunk(self, choice: dict[str, Any], so_far: Usage) -> bytes:
        told = tokens_object(so_far) if self._usage_told is UsageTold.ALWAYS else None
        made = self._head.object(self._choices.kind, [choice], told)
        if self._usage_told is UsageTold.NEVER:
            del made["usage"]
        return frame(made)


class ChatChoices:
    """chat.completion.chunk: the role first, then pieces of content, then how it ended."""

    kind, path = "chat.completion.chunk", "/v1/chat/completions"

    def __init__(self, sampling: Sampling) -> None:
        self._scored = sampling.logprobs is not None

    def opening(self, index: int, started: Started) -> dict[str, Any]:
        return _chat_choice(index, {"role": "assistant", "content": ""})

    def piece(self, delta: Delta) -> dict[str, Any]:
        choice = _chat_choice(delta.index, {"content": delta.text})
        return {**choice, "logprobs": chat_logprobs(delta.tokens)} if self._scored else choice

    def closing(self, index: int, ending: Ending) -> dict[str, Any]:
        return {**_chat_choice(index, {}), **ending_fields(ending)}


class TextChoices:
    """text_completion: pieces of text, behind the prompt if it is to be echoed, then how it ended."""

    kind, path = "text_completion", "/v1/completions"

    def __init__(self, sampling: Sampling, *, echo: bool) -> None:
        self._scored = sampling.logprobs is not None
        self._echo = echo
        self._logprobs: defaultdict[int, TextLogprobs] = defaultdict(TextLogprobs)

    def opening(self, index: int, started: Started) -> dict[str, Any] | None:
        return _text_choice(index, started.prompt or "") if self._echo else None

    def piece(self, delta: Delta) -> dict[str, Any]:
        choice = _text_choice(delta.index, delta.text)
        return {**choice, "logprobs": self._logprobs[delta.index].told(delta.tokens)} if self._scored else choice

    def closing(self, index: int, ending: Ending) -> dict[str, Any]:
        return {**_text_choice(index, ""), **ending_fields(ending)}


def _chat_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None}
