"""What a server refuses or breaks, as errors that a client may see: without its key, and without its address."""

import json
from collections.abc import Mapping
from typing import Any

from app.errors import (
    AppError,
    EngineBusy,
    EngineFailed,
    InvalidRequest,
    PayloadTooLarge,
    PiiBlocked,
)

MAX_MESSAGE_CHARS = 500
_BUSY_SECONDS, _MOST_BUSY_SECONDS = 1.0, 30.0
BUSY_STATUSES = frozenset([429, 503])
"""It takes no more now: too many requests, or it is loading or shutting down."""
GATEWAY_STATUSES = frozenset([502, 504])
"""What stands in front of it does not reach it."""
_GENERATION_FAILED = 424
"""What TGI calls a failure of its own."""


def is_fault(status: int) -> bool:
    """Return whether a server that answers so has failed itself."""
    return (status >= 500 and status not in BUSY_STATUSES) or status == _GENERATION_FAILED


class UpstreamError(Exception):
    """A server could not be reached, or failed before it answered; another one may do better."""

    def __init__(self, reason: str, *, may_have_moved: bool = False, for_certain: bool = False) -> None:
        """Args:
        reason: for the log and /status.
        may_have_moved: whether a new connection may help at once.
        for_certain: whether the next request would fail, too.
        """
        super().__init__(reason)
        self.reason = reason
        self.may_have_moved = may_have_moved
        self.for_certain = for_certain


class ErrorReader:
    """Reads the errors of servers, whose messages may repeat what must not be shown."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        """Args: secrets: what no message may hold: key, values of headers, addresses."""
        self._secrets = tuple(sorted(filter(None, secrets), key=len, reverse=True))

    def of_response(self, status: int, content: bytes, headers: Mapping[str, str]) -> AppError:
        """Return the error that a response with this status stands for."""
        error = _object(content)
        if status in BUSY_STATUSES:
            return EngineBusy(
                "The model's server takes no more requests now. Try again later.", retry_after=_wait(headers)
            )
        if status in (401, 403):
            return EngineFailed("The model's server refuses this service's key; its operator has to correct that.")
        if status == 404:
            return EngineFailed("The model's server does not have this model or this route.")
        if 400 <= status < 500 and not is_fault(status):
            return self._refusal(status, error)
        return EngineFailed(f"The model's server failed with status {status}. Try again.")

    def of_stream(self, error: Any) -> AppError:
        """Return the error that an error in a stream stands for."""
        fields = error if isinstance(error, Mapping) else {"message": error}
        code = fields.get("code")
        if code in (400, "400") or fields.get("type") in ("invalid_request_error", "BadRequestError"):
            return self._refusal(400, fields)
        return EngineFailed(f"The model's server failed during the answer: {self._message(fields)}")

    def _refusal(self, status: int, error: Mapping[str, Any]) -> AppError:
        message, field = self._message(error), error.get("param")
        if status == 413:
            return PayloadTooLarge("The request is too long for the model's server.")
        if error.get("code") == "pii_blocked":
            return PiiBlocked(message)
        known = isinstance(field, str) and field.replace("_", "").replace(".", "").isalnum()
        details: dict[str, Any] = {"errors": [{"field": field, "reason": message}]} if known else {}
        return InvalidRequest(f"The model's server refuses the request: {message}", details=details)

    def _message(self, error: Mapping[str, Any]) -> str:
        given = error.get("message") or error.get("detail")
        text = given if isinstance(given, str) else "it does not say why"
        for secret in self._secrets:
            text = text.replace(secret, "[hidden]")
        return " ".join(text.split())[:MAX_MESSAGE_CHARS]


def _object(content: bytes) -> Mapping[str, Any]:
    """Return the error object of a body; empty where there is none."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, Mapping):
        return {}
    error = body.get("error", body)
    return error if isinstance(error, Mapping) else {"message": error}


def _wait(headers: Mapping[str, str]) -> float:
    given = headers.get("retry-after", "")
    seconds = float(given) if given.isdecimal() and len(given) < 9 else _BUSY_SECONDS
    return min(max(seconds, _BUSY_SECONDS), _MOST_BUSY_SECONDS)
