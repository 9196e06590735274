"""OpenAI's response objects as plain dicts for `encode_json`, with the fields in OpenAI's order."""

import codecs
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any, Literal, NotRequired

from msgspec import structs
from typing_extensions import TypedDict

from app import __version__
from app.engine.base import EngineInfo
from app.events import Completion, DetokenizedLogprob, Finished, FinishedSample, PromptLogprob
from app.types import FinishReason, Usage
from app.web.http.json_encoding import JsonArray, exact_float
from app.web.http.tool_calls import FunctionObject, ToolCallObject, tool_call_objects


class CachedTokens(TypedDict):
    """How the prompt's tokens were computed."""

    cached_tokens: int


class ReasoningTokens(TypedDict):
    """How the completion's tokens were used."""

    reasoning_tokens: int


class UsageObject(TypedDict):
    """Token counts: the shared prompt once, the tokens of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class ChatToken(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatToken):
    """A generated token, and the most likely ones at its position."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    """The log-probabilities of a chat completion."""

    content: list[ChatTokenLogprob]
    refusal: None


class RankedLogprob(TypedDict):
    """How likely a token of the prompt was, and how many were at least as likely; vLLM's object."""

    logprob: float
    rank: int
    decoded_token: str


class ChatReply(TypedDict):
    """The message that the model generated; a field that is not required is left out where it would be empty."""

    role: Literal["assistant"]
    content: str | None
    """None where the message only calls."""
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    """The same under its newer name."""
    tool_calls: NotRequired[list[ToolCallObject]]
    function_call: NotRequired[FunctionObject]
    """In the place of tool_calls, for a request with `functions`."""


class ChatChoice(TypedDict):
    """One of a request's completions."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["function_call"]
    stop_reason: str | int | None


class ChatCompletion(TypedDict):
    """OpenAI's chat completion object."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    system_fingerprint: str
    service_tier: NotRequired[str]
    metadata: NotRequired[dict[str, str]]
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None]]


class TextLogprobsObject(TypedDict):
    """The log-probabilities of a plain completion, token by token, after those of the prompt if that is echoed."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(TypedDict):
    """One of a request's completions."""

    index: int
    text: str
    logprobs: TextLogprobsObject | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[list[dict[str, RankedLogprob] | None]]


class TextCompletion(TypedDict):
    """OpenAI's text completion object."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageObject
    system_fingerprint: str


@lru_cache(maxsize=64)
def fingerprint(info: EngineInfo) -> str:
    """Return the system fingerprint; if it changes, the same seed may give another completion."""
    facts = info.as_dict()
    # Measured anew at each load.
    del facts["step_times"]
    return "fp_" + hashlib.sha256(repr((__version__, facts)).encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectMetadata:
    """The fields that all objects of one response share."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    service_tier: str | None = None
    """Left out unless the request named one."""

    def object(self, kind: str, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """Return a response or chunk object."""
        fields = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "usage": usage,
            "system_fingerprint": self.system_fingerprint,
        }
        return fields if self.service_tier is None else {**fields, "service_tier": self.service_tier}


def tokens_object(usage: Usage) -> dict[str, Any]:
    """Return the token counts so far."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def usage_object(finished: Finished) -> dict[str, Any]:
    """Return the token counts of a finished request: the shared prompt once, the tokens of all choices."""
    usage = finished.usage
    return {
        **tokens_object(usage),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning_tokens for each in finished.samples)},
    }


def chat_message(completion: Completion, *, as_functions: bool) -> dict[str, Any]:
    """Return the message of a whole chat completion.

    Args: as_functions: whether a call is in the older form, of which there is only one.
    """
    calls = completion.tool_calls
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if calls and not completion.text:
        message["content"] = None
    if completion.reasoning:
        message |= reasoning_fields(completion.reasoning)
    if calls and as_functions:
        message["function_call"] = {"name": calls[0].name, "arguments": calls[0].arguments}
    elif calls:
        message["tool_calls"] = tool_call_objects(calls)
    return message


def reasoning_fields(reasoning: str) -> dict[str, str]:
    """Return reasoning under both names that clients read."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


def chat_finish_fields(sample: FinishedSample, *, as_functions: bool) -> dict[str, Any]:
    """Return the finish fields of a chat completion.  Args: as_functions: as for `chat_message`."""
    fields = finish_fields(sample)
    if as_functions and sample.finish_reason is FinishReason.TOOL_CALLS:
        fields["finish_reason"] = "function_call"
    return fields


def finish_fields(sample: FinishedSample) -> dict[str, Any]:
    """Return the finish reason and, as in vLLM, the stop string or token that matched."""
    return {"finish_reason": sample.finish_reason.value, "stop_reason": sample.stop_reason}


def chat_logprobs(tokens: Sequence[DetokenizedLogprob]) -> dict[str, Any]:
    """Return the log-probabilities of a chat delta."""
    return {"content": _chat_tokens(tokens), "refusal": None}


class ChatLogprobsEncoder:
    """Encodes the log-probabilities of one whole chat completion; a `LogprobsEncoder`."""

    def __init__(self) -> None:
        self._content = JsonArray()

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        self._content.extend(_chat_tokens(tokens))

    def object(self) -> dict[str, Any]:
        """Return the log-probabilities so far."""
        return {"content": self._content, "refusal": None}


def _chat_tokens(tokens: Sequence[DetokenizedLogprob]) -> list[dict[str, Any]]:
    return [{**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens]


def _chat_token(token: DetokenizedLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": exact_float(token.logprob), "bytes": list(token.raw)}


def _top_by_name(token: DetokenizedLogprob) -> dict[str, Any]:
    """Return the most likely tokens by their texts, and the token itself even if it is not among them.

    The token keeps its text, by which clients look it up.  Another one of the same text gets a name of its own:
    OpenAI's for bytes that are no text, `bytes:\\xe2\\x80`, else vLLM's, `token_id:42`.
    """
    named = {token.text: token}
    others = [each for each in token.top if each.token_id != token.token_id or each.raw != token.raw]
    for each in others:
        named[next(name for name in _names(each) if name not in named)] = each
    return {name: exact_float(each.logprob) for name, each in sorted(named.items(), key=lambda item: -item[1].logprob)}


def _names(token: DetokenizedLogprob) -> Iterator[str]:
    """Yield the names that a token may have in an object, the best first; never ends."""
    yield token.text
    if not _is_utf8(token.raw):
        yield "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
    if token.token_id is not None:
        yield f"token_id:{token.token_id}"
    yield from (f"{token.text} ({number})" for number in count(2))


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


class TextLogprobs:
    """Builds the log-probabilities of one plain completion, delta by delta or as a whole."""

    def __init__(self, echo: int | None = None) -> None:
        """Args: echo: alternatives to the tokens of the prompt before the completion; None where there is none."""
        self._echo = echo
        self._offset = 0
        """Characters before the next token; a character of several tokens counts with the last of them."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._arrays = {name: JsonArray() for name in ("text_offset", "token_logprobs", "tokens", "top_logprobs")}

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        for name, items in self.next_object(tokens).items():
            self._arrays[name].extend(items)

    def extend_prompt(self, tokens: Sequence[PromptLogprob]) -> None:
        if self._echo is not None:
            for name, items in self.next_prompt_object(tokens).items():
                self._arrays[name].extend(items)

    def object(self) -> dict[str, Any]:
        """Return the log-probabilities of all tokens that `extend` and `extend_prompt` have taken."""
        return dict(self._arrays)

    def next_prompt_object(self, tokens: Sequence[PromptLogprob]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens of the prompt, null where there is none."""
        starts = [self._offset, *(token.end for token in tokens)]
        self._offset = starts.pop()
        return {
            "text_offset": starts,
            "token_logprobs": [None if each.logprob is None else exact_float(each.logprob) for each in tokens],
            "tokens": [each.text for each in tokens],
            "top_logprobs": [self._prompt_alternatives(each) for each in tokens],
        }

    def _prompt_alternatives(self, token: PromptLogprob) -> dict[str, Any] | None:
        if token.logprob is None:
            return None
        own, *others = (
            DetokenizedLogprob(each.text, each.raw, each.logprob, token_id=each.token_id)
            for each in (token, *token.top[: self._echo])
            if each.logprob is not None
        )
        return _top_by_name(structs.replace(own, top=tuple(others)))

    def next_object(self, tokens: Sequence[DetokenizedLogprob]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens."""
        return {
            "text_offset": [self._advance(token) for token in tokens],
            "token_logprobs": [exact_float(token.logprob) for token in tokens],
            "tokens": [token.text for token in tokens],
            "top_logprobs": [_top_by_name(token) for token in tokens],
        }

    def _advance(self, token: DetokenizedLogprob) -> int:
        before = self._offset
        self._offset += len(self._decoder.decode(token.raw))
        return before
