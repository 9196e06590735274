"""Response schemas and the stream encoder that the native generating routes share."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from app.engine.tokenizer.logprob_text import AnswerToken
from app.errors import AppError
from app.generation.requests import Completion, Delta, Ending, Event, Finished, Reply, Sampling
from app.types import FinishReason, Usage
from app.web.http.errors import envelope
from app.web.http.json_encoding import exact_float
from app.web.http.sse import frame


class PromptTokensDetails(BaseModel):
    """How the prompt's tokens were computed."""

    cached_tokens: int
    """Tokens taken from the KV cache."""


class TokenUsage(BaseModel):
    """Token counts by the model's own tokenizer; all completions of a request share one prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> "TokenUsage":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        )


class CandidateToken(BaseModel):
    """A candidate token and its log-probability."""

    text: str
    logprob: float


class GeneratedToken(CandidateToken):
    """A generated token, and the most likely candidates at its position."""

    top: list[CandidateToken]

    @classmethod
    def of(cls, token: AnswerToken) -> "GeneratedToken":
        top = [CandidateToken(text=other.text, logprob=other.logprob) for other in token.top]
        return cls(text=token.text, logprob=token.logprob, top=top)


def token_fields(tokens: Sequence[AnswerToken], sampling: Sampling) -> dict[str, list[GeneratedToken]]:
    """Return the field `tokens` if the request asked for log-probabilities, and no field otherwise."""
    return {} if sampling.logprobs is None else {"tokens": [GeneratedToken.of(token) for token in tokens]}


class CompletionChoice(BaseModel):
    """One of a request's completions."""

    text: str
    finish_reason: FinishReason
    tokens: list[GeneratedToken] = []
    """Left out unless the request asked for log-probabilities."""

    @classmethod
    def of(cls, completion: Completion, sampling: Sampling) -> "CompletionChoice":
        return cls(
            text=completion.text,
            finish_reason=completion.finish_reason,
            **token_fields(completion.tokens, sampling),
        )


def completion_choices(reply: Reply, sampling: Sampling) -> list[CompletionChoice]:
    """Return the schemas of all completions, in their order."""
    return [CompletionChoice.of(completion, sampling) for completion in reply.completions]


class CompletionEnd(BaseModel):
    """How one completion of a stream ended."""

    index: int
    finish_reason: FinishReason
    tokens_generated: int


class DoneFrame(BaseModel):
    """The last frame of a stream."""

    finish_reason: FinishReason
    usage: TokenUsage
    tokens_generated: int
    cached: bool
    session_id: str | None
    request_id: str
    model: str
    completions: list[CompletionEnd] = []
    """Left out unless there are several."""


class NativeStreamEncoder:
    """Encodes events as `delta`, `done` and `error` frames; `Started` produces no frame."""

    def __init__(self, sampling: Sampling, request_id: str) -> None:
        self._sampling = sampling
        self._request_id = request_id

    def encode(self, event: Event) -> bytes:
        match event:
            case Delta():
                return frame(_delta(event, self._sampling), "delta")
            case Finished():
                return frame(self._done(event), "done")
        return b""

    def encode_error(self, error: AppError) -> bytes:
        return frame(envelope(error, self._request_id), "error")

    def _done(self, finished: Finished) -> dict[str, Any]:
        done = DoneFrame(
            finish_reason=finished.finish_reason,
            usage=TokenUsage.of(finished.usage),
            tokens_generated=finished.usage.completion_tokens,
            cached=finished.cached,
            session_id=finished.session_id,
            request_id=self._request_id,
            model=finished.model,
            **_endings(finished.endings),
        )
        return done.model_dump(exclude_unset=True)


def _delta(delta: Delta, sampling: Sampling) -> dict[str, Any]:
    data: dict[str, Any] = {"content": delta.text}
    if sampling.n > 1:
        data["index"] = delta.index
    if sampling.logprobs is not None:
        data["tokens"] = [{**_token(token), "top": [_token(other) for other in token.top]} for token in delta.tokens]
    return data


def _token(token: AnswerToken) -> dict[str, Any]:
    return {"text": token.text, "logprob": exact_float(token.logprob)}


def _endings(endings: Sequence[Ending]) -> dict[str, list[CompletionEnd]]:
    if len(endings) == 1:
        return {}
    completions = [
        CompletionEnd(index=index, finish_reason=ending.finish_reason, tokens_generated=ending.tokens)
        for index, ending in enumerate(endings)
    ]
    return {"completions": completions}
