"""What the answers of the generating routes have in common: usage, errors and frames.  Translation only."""

from pydantic import BaseModel

from app import errors
from app.generation.asks import Delta, Event, Finished
from app.types import FinishReason, Usage
from app.web.sse import Frame

GENERATION_ERRORS: tuple[type[errors.AppError], ...] = (
    errors.InvalidRequest,
    errors.ContextLengthExceeded,
    errors.PiiBlocked,
    errors.Unauthorized,
    errors.ModelNotFound,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.RateLimited,
    errors.InternalError,
    errors.ServiceUnavailable,
    errors.DeadlineExceeded,
)


class UsageReply(BaseModel):
    """Tokens, counted with the model's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "UsageReply":
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )


class DoneFrame(BaseModel):
    """The last frame of a stream."""

    finish_reason: FinishReason
    usage: UsageReply
    tokens_generated: int
    cached: bool
    session_id: str | None
    request_id: str
    model: str


def native_frame(event: Event, request_id: str) -> Frame | None:
    """Return the native frame of an event; that an answer has begun has none."""
    match event:
        case Delta():
            return "delta", {"content": event.text}
        case Finished():
            done = DoneFrame(
                finish_reason=event.finish_reason,
                usage=UsageReply.of(event.usage),
                tokens_generated=event.usage.completion_tokens,
                cached=event.cached,
                session_id=event.session_id,
                request_id=request_id,
                model=event.model,
            )
            return "done", done.model_dump()
    return None
