"""The one event type: it comes from an engine, passes the chain, and ends in a dialect's encoder.

A stream is one `Started`, any number of `Delta`, one `Finished`, or an `AppError` in the place of any of them.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from enum import StrEnum

import msgspec

from app.types import FinishReason, ToolCall, Usage


class DetokenizedLogprob(msgspec.Struct, frozen=True):
    """A token as text, and how likely the model found it."""

    text: str
    """The token on its own; a part of a character is U+FFFD."""
    raw: bytes
    """The same as UTF-8, exact."""
    logprob: float
    """Natural logarithm of the probability; -9999 for an impossible token, as OpenAI writes it."""
    top: tuple["DetokenizedLogprob", ...] = ()
    """The most likely tokens at this position, most likely first."""
    token_id: int | None = None
    """Tells tokens of equal text from one another; None where an engine has no others."""


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of the prompt as text, and how likely the model found it there."""

    token_id: int | None
    """None where it is withheld: personal data stands here or before."""
    text: str = ""
    """The token on its own; a part of a character is U+FFFD."""
    raw: bytes = b""
    """The same as UTF-8, exact."""
    logprob: float | None = None
    """Natural logarithm of the probability; None for the first token, and where it is withheld."""
    rank: int = 0
    """How many tokens are at least as likely: 1 for the likeliest; 0 where `logprob` is None."""
    top: tuple["PromptLogprob", ...] = ()
    """The most likely tokens at this position, most likely first."""
    end: int = 0
    """How many characters of the prompt's text end with it; a control token has no text there."""


WITHHELD = PromptLogprob(token_id=None)
"""Stands for a token that the client may not see."""


class CacheStatus(StrEnum):
    """Whether the response came from the response cache."""

    HIT = "hit"
    """It is replayed, and nothing is generated."""
    MISS = "miss"
    BYPASS = "bypass"
    """The cache was not consulted."""


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The request is valid and admitted; comes once for each prompt."""

    prompt_tokens: int = 0
    cache: CacheStatus = CacheStatus.BYPASS
    index: int = 0
    """The first sample that it starts."""
    model: str = ""
    prompt: str | None = None
    """The prompt as text, after the input filter; None for a chat."""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next part of a call of a tool; its first part has the id and the name."""

    position: int = 0
    """Which of the sample's calls it continues, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """More of the JSON text of the arguments."""


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New text of one sample.  Empty while a filter or a stop string withholds the text of its tokens."""

    text: str = ""
    reasoning: str = ""
    """What the model thinks before it answers; no part of `text`."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    index: int = 0
    """Which sample it continues."""
    tokens: int = 0
    """Tokens generated for this sample since the delta before."""
    logprobs: tuple[DetokenizedLogprob, ...] = ()
    """Log-probabilities of the tokens whose text ends in this delta, if the request asks for them.  The token that ends
    the sample is among them only if the prompt's are asked for too."""
    token_ends: tuple[int, ...] = ()
    """For each of `logprobs` how many characters of `text` its token ends after."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """The next tokens of the prompt, from its first, if the request asks for them; all come before any text."""
    ends: tuple[int, ...] = ()
    """The same for each of `tokens`, where the request has `shown_tokens`; no parser's delta has it."""

    @property
    def all_text(self) -> str:
        """Return everything in it that the model wrote: reasoning, text and the arguments of calls."""
        return self.reasoning + self.text + "".join(call.arguments for call in self.tool_calls)

    @property
    def is_visible(self) -> bool:
        """Return whether it holds anything but the number of generated tokens."""
        return bool(self.text or self.reasoning or self.tool_calls or self.logprobs or self.prompt_logprobs)


class FinishedSample(msgspec.Struct, frozen=True, kw_only=True):
    """How one sample ended."""

    finish_reason: FinishReason
    completion_tokens: int
    stop_reason: str | int | None = None
    """The stop string or stop token that matched, as vLLM reports it."""
    reasoning_tokens: int = 0
    """Of the completion's tokens those of its reasoning."""

    @property
    def breaks_off(self) -> bool:
        """Return whether the model would have gone on, so that its text may end in the middle of a word."""
        ended = self.finish_reason in (FinishReason.STOP, FinishReason.TOOL_CALLS)
        return not ended or self.stop_reason is not None


class ContextUsage(msgspec.Struct, frozen=True, kw_only=True):
    """How a conversation was fitted into the context window."""

    limit: int
    """Tokens that prompt and completion share."""
    prompt_tokens: int
    turns_kept: int
    """Earlier turns of the conversation in the prompt."""
    turns_dropped: int
    """Earlier turns left out because they did not fit; the oldest go first."""
    is_estimate: bool = False
    """Whether `prompt_tokens`, by which they were fitted, is a guess that is rather too high."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The response is complete; the last event, exactly once."""

    samples: tuple[FinishedSample, ...]
    usage: Usage
    """The sum over all samples, which share one prompt."""
    cache: CacheStatus = CacheStatus.BYPASS
    model: str = ""
    session_id: str | None = None
    context: ContextUsage | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """Return how the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def cached(self) -> bool:
        """Return whether nothing at all was generated."""
        return self.cache is CacheStatus.HIT


Event = Started | Delta | Finished


def finish(reason: FinishReason, usage: Usage, stop_reason: str | int | None = None) -> Finished:
    """Return the last event of a single sample."""
    sample = FinishedSample(finish_reason=reason, completion_tokens=usage.completion_tokens, stop_reason=stop_reason)
    return Finished(samples=(sample,), usage=usage)


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One whole sample."""

    text: str
    end: FinishedSample
    logprobs: tuple[DetokenizedLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[PromptLogprob, ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        return self.end.finish_reason


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """All samples of a request, and of each of its prompts."""

    completions: tuple[Completion, ...]
    prompts: tuple[str | None, ...]
    """One for each prompt of the request."""
    finished: Finished

    @property
    def text(self) -> str:
        """Return the first sample."""
        return self.completions[0].text

    @property
    def prompt(self) -> str | None:
        """Return the first prompt."""
        return self.prompts[0]


async def collect(events: AsyncGenerator[Event, None]) -> Response:
    """Read a stream to its end, and close it.

    Raises: AppError: whatever ended it in place of Finished.
    """
    deltas: defaultdict[int, list[Delta]] = defaultdict(list)
    prompts: dict[int, str | None] = {}
    async with aclosing(events):
        async for event in events:
            match event:
                case Delta():
                    deltas[event.index].append(event)
                case Started():
                    prompts[event.index] = event.prompt
                case Finished():
                    return Response(
                        completions=tuple(_join(deltas[index], end) for index, end in enumerate(event.samples)),
                        prompts=tuple(prompt for _, prompt in sorted(prompts.items())),
                        finished=event,
                    )
    raise RuntimeError("a stream ended without its last event")


def _join(deltas: list[Delta], end: FinishedSample) -> Completion:
    return Completion(
        text="".join(delta.text for delta in deltas),
        end=end,
        logprobs=tuple(token for delta in deltas for token in delta.logprobs),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=join_tool_calls(part for delta in deltas for part in delta.tool_calls),
        prompt_logprobs=tuple(token for delta in deltas for token in delta.prompt_logprobs),
    )


def join_tool_calls(parts: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Return the calls of one sample from their parts, in the order of their positions."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        so_far = calls.get(part.position, ToolCall("", "", ""))
        calls[part.position] = ToolCall(
            id=part.id or so_far.id, name=part.name or so_far.name, arguments=so_far.arguments + part.arguments
        )
    return tuple(call for _, call in sorted(calls.items()))
