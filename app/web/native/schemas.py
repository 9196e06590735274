"""What the answers of the generating routes have in common: usage, errors and frames.  Translation only."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from app import errors
from app.engine.tokenizer.logprob_text import AnswerToken
from app.generation.requests import Completion, Delta, Ending, Event, Finished, Reply, Sampling
from app.types import FinishReason, Usage
from app.web.http.errors import envelope
from app.web.http.sse import frame

GENERATION_ERRORS: tuple[type[errors.AppError], ...] = (
    errors.InvalidRequest,
    errors.ContextLengthExceeded,
    errors.PiiBlocked,
    errors.Unauthorized,
    errors.Forbidden,
    errors.ModelNotFound,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.RateLimited,
    errors.QuotaExceeded,
    errors.InternalError,
    errors.ServiceUnavailable,
    errors.DeadlineExceeded,
)


class PromptTokensDetails(BaseModel):
    """What became of the prompt's tokens."""

    cached_tokens: int
    """Those that did not have to be computed again."""


class UsageReply(BaseModel):
    """Tokens, counted with the model's own tokenizer; all answers to a request share one prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> "UsageReply":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        )


class TopToken(BaseModel):
    """A token that the model might have said."""

    text: str
    logprob: float


class TokenReply(TopToken):
    """A token of an answer, and the most likely ones in its place."""

    top: list[TopToken]

    @classmethod
    def of(cls, token: AnswerToken) -> "TokenReply":
        top = [TopToken(text=other.text, logprob=other.logprob) for other in token.top]
        return cls(text=token.text, logprob=token.logprob, top=top)


def token_replies(tokens: Sequence[AnswerToken], sampling: Sampling) -> dict[str, list[TokenReply]]:
    """Return the field `tokens` if log-probabilities were asked for, and no field otherwise."""
    return {} if sampling.logprobs is None else {"tokens": [TokenReply.of(token) for token in tokens]}


class CompletionReply(BaseModel):
    """One answer of those asked for."""

    text: str
    finish_reason: FinishReason
    tokens: list[TokenReply] = []
    """Left out unless log-probabilities were asked for."""

    @classmethod
    def of(cls, completion: Completion, sampling: Sampling) -> "CompletionReply":
        return cls(
            text=completion.text,
            finish_reason=completion.finish_reason,
            **token_replies(completion.tokens, sampling),
        )


def completion_replies(reply: Reply, sampling: Sampling) -> list[CompletionReply]:
    """Translate all answers, in their order."""
    return [CompletionReply.of(completion, sampling) for completion in reply.completions]


class EndingReply(BaseModel):
    """How one answer of a stream ended."""

    index: int
    finish_reason: FinishReason
    tokens_generated: int


class DoneFrame(BaseModel):
    """The last frame of a stream."""

    finish_reason: FinishReason
    usage: UsageReply
    tokens_generated: int
    cached: bool
    session_id: str | None
    request_id: str
    model: str
    completions: list[EndingReply] = []
    """Left out unless there are several."""


class NativeStream:
    """Writes the frames `delta`, `done` and `error`; that an answer has begun has none."""

    def __init__(self, sampling: Sampling, request_id: str) -> None:
        self._sampling = sampling
        self._request_id = request_id

    def frames(self, event: Event) -> bytes:
        match event:
            case Delta():
                return frame(_delta(event, self._sampling), "delta")
            case Finished():
                return frame(self._done(event), "done")
        return b""

    def failure(self, error: errors.AppError) -> bytes:
        return frame(envelope(error, self._request_id), "error")

    def _done(self, finished: Finished) -> dict[str, Any]:
        done = DoneFrame(
            finish_reason=finished.finish_reason,
            usage=UsageReply.of(finished.usage),
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
    tokens = token_replies(delta.tokens, sampling)
    return data | {name: [token.model_dump() for token in value] for name, value in tokens.items()}


def _endings(endings: Sequence[Ending]) -> dict[str, list[EndingReply]]:
    if len(endings) == 1:
        return {}
    told = [
        EndingReply(index=index, finish_reason=ending.finish_reason, tokens_generated=ending.tokens)
        for index, ending in enumerate(endings)
    ]
    return {"completions": told}
