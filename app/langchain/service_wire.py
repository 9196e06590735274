"""Translates the streams and errors of a service that runs elsewhere; `app.engine.remote` has the rest of its wire."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.engine.remote.chunks import CallPart, Choice, Chunk, FunctionPart, UsagePart, argument_text, logprobs_of
from app.errors import (
    AppError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    PiiBlocked,
    QuotaExceeded,
    RateLimited,
    ServiceUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from app.events import CacheStatus, Delta, Finished, FinishedSample, ToolCallDelta
from app.types import FinishReason, Usage

MAX_ALTERNATIVES = 21
"""To a token, at a position of a completion: as many as can be asked for, and the token itself."""

_BY_CODE: Mapping[str, type[AppError]] = {
    "model_not_found": ModelNotFound,
    "insufficient_quota": QuotaExceeded,
    "pii_blocked": PiiBlocked,
}
_BY_STATUS: Mapping[int, type[AppError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
    429: RateLimited,
    503: ServiceUnavailable,
    504: DeadlineExceeded,
}


class StreamReader:
    """Turns the chunks of one stream into events."""

    def __init__(self, *, cached: bool) -> None:
        """Args: cached: whether the service said that the response comes from its cache."""
        self._cache = CacheStatus.HIT if cached else CacheStatus.BYPASS
        self._reason: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._usage = UsagePart()

    def read(self, chunk: Chunk) -> Iterator[Delta]:
        """Yield what a chunk says.

        Raises: AppError: it is an error, in place of the rest of the stream.
        """
        if chunk.error is not None:
            raise error_from(_status_in_stream(chunk.error), {"error": chunk.error}, {})
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices or ():
            if choice.finish_reason is not None:
                self._reason = FinishReason(choice.finish_reason)
                self._stop_reason = choice.stop_reason
            delta = _delta(choice)
            if delta.is_visible:
                yield delta

    def finish(self) -> Finished:
        """Return the last event.

        Raises: ServiceUnavailable: the stream ended before the response did.
        """
        if self._reason is None:
            raise ServiceUnavailable("The service's stream ended before its answer did; try again.")
        usage = Usage(self._usage.prompt_tokens, self._usage.completion_tokens, self._usage.cached_tokens)
        sample = FinishedSample(
            finish_reason=self._reason,
            completion_tokens=usage.completion_tokens,
            stop_reason=self._stop_reason,
            reasoning_tokens=self._usage.reasoning_tokens,
        )
        return Finished(samples=(sample,), usage=usage, cache=self._cache)


def _status_in_stream(error: Mapping[str, Any]) -> int:
    """Return the status that an error would have had before the stream began."""
    by_code = {"service_unavailable": 503, "deadline_exceeded": 504, "internal_server_error": 500}
    return by_code.get(str(error.get("code")), 400)


def _delta(choice: Choice) -> Delta:
    part = choice.part
    return Delta(
        text=part.content or "",
        reasoning=part.reasoning_content or "",
        tool_calls=tuple(map(_call_delta, part.tool_calls or ())),
        logprobs=logprobs_of(choice.logprobs, MAX_ALTERNATIVES),
    )


def _call_delta(part: CallPart) -> ToolCallDelta:
    function = part.function or FunctionPart()
    return ToolCallDelta(
        position=part.index or 0,
        id=part.id,
        name=function.name,
        arguments=argument_text(function.arguments),
    )


def error_from(status: int, body: Any, headers: Mapping[str, str]) -> AppError:
    """Return the exception that stands for an error of the service, with the service's own message."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        return ServiceUnavailable(f"What answers there is not this service, or not in its way: status {status}.")
    message, field = str(error.get("message")), error.get("param")
    kind = _BY_CODE.get(str(error.get("code"))) or _BY_STATUS.get(status) or InternalError
    details: dict[str, Any] = {"code": error.get("code")}
    if field is not None:
        details["errors"] = [{"field": field, "reason": message}]
    wait = headers.get("retry-after", "")
    return kind(message, details=details, retry_after=float(wait) if wait.isdigit() else None)
