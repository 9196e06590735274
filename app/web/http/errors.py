"""Decide how an error looks to a client: the JSON envelope, its headers, or the last frame of a stream.

The one place that knows the native envelope, and chooses in `error_response` by the path whether OpenAI's is the one
to send.  Knows no route.  What a client sent is never echoed, but for the cleaned name of an unknown field.
"""

import math
import re
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from app.errors import (
    AppError,
    ClientDisconnected,
    InternalError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from app.web.openai import errors as openai

MAX_ERRORS_NAMED = 20
MAX_FIELD_CHARS = 80
MAX_REASON_CHARS = 200

_SPEAKS_OF_THE_SCHEMA_ONLY = frozenset(
    """missing extra_forbidden string_type string_too_short string_too_long string_pattern_mismatch int_type float_type
    bool_type none_required list_type too_short too_long greater_than greater_than_equal less_than less_than_equal
    literal_error finite_number model_type model_attributes_type dict_type value_error""".split()
)
"""pydantic's error types whose message holds nothing of the input; of any other only the field is named."""

_log = structlog.get_logger("llm_service")


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: str = Field(examples=["validation_error"])
    message: str
    details: dict[str, Any]
    timestamp: str = Field(examples=["2026-01-31T12:00:00Z"])
    request_id: str


def envelope(error: AppError, request_id: str) -> dict[str, Any]:
    """Render the native error object."""
    return ErrorBody(
        error=error.code,
        message=error.message,
        details=error.details,
        timestamp=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        request_id=request_id,
    ).model_dump()


def error_response(scope: Scope, error: AppError, headers: Mapping[str, str] | None = None) -> Response:
    """Make the answer to a request that failed before its answer began."""
    speaks_openai = openai.speaks(scope["path"])
    return JSONResponse(
        openai.envelope(error, scope["path"]) if speaks_openai else envelope(error, scope["state"]["request_id"]),
        status_code=error.status,
        headers={**_own_headers(error), **(openai.headers(error) if speaks_openai else {}), **(headers or {})},
    )


def _own_headers(error: AppError) -> dict[str, str]:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def as_app_error(error: Exception) -> AppError:
    """Find what a client may know of any exception; the unexpected is logged here, and only here."""
    match error:
        case AppError():
            return error
        case RequestValidationError():
            return _from_validation(error.errors())
        case HTTPException():
            return _from_http(error)
    _log.error("Unexpected error", error=type(error).__name__, exception=trace(error))
    return InternalError("The service failed. If you report this, name the request id.")


def trace(error: BaseException) -> str:
    """Format where an exception came from, without its message: that may hold what a client sent."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return "\ncaused by:\n".join(parts)


def _from_validation(errors: Sequence[Any]) -> InvalidRequest:
    named = [{"field": _field(item["loc"]), "reason": _reason(item)} for item in errors[:MAX_ERRORS_NAMED]]
    return InvalidRequest(f"{named[0]['field']}: {named[0]['reason']}", details={"errors": named})


def _field(location: Sequence[str | int]) -> str:
    # The first part says where the field was: body, path, query.  An unknown field's name is the client's own text.
    path = ".".join(re.sub(r"[^A-Za-z0-9_-]", "?", str(part)[:MAX_FIELD_CHARS]) for part in location[1:])
    return path[:MAX_FIELD_CHARS] or str(location[0])


def _reason(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such field"
    if item["type"] not in _SPEAKS_OF_THE_SCHEMA_ONLY:
        return "is not valid"
    return str(item["msg"]).removeprefix("Value error, ")[:MAX_REASON_CHARS]


class _HttpError(AppError):
    """An error of the router's own, such as 405, under the status that it chose."""

    def __init__(self, status: int) -> None:
        phrase = HTTPStatus(status).phrase
        super().__init__(f"{phrase}.")
        self.status = status  # type: ignore[misc]  # of this object, where other errors have it by class
        self.code = phrase.lower().replace(" ", "_")  # type: ignore[misc]


def _from_http(error: HTTPException) -> AppError:
    match error.status_code:
        case 404:
            return NotFound("There is nothing at this path.")
        case 413:
            return PayloadTooLarge("The body is longer than this service reads.")
        case 415:
            return UnsupportedMediaType("Send the body as application/json.")
    return _HttpError(error.status_code)


async def _handle(request: Request, error: Exception) -> Response | None:
    if isinstance(error, ClientDisconnected):
        return None
    headers = error.headers if isinstance(error, HTTPException) else None
    return error_response(request.scope, as_app_error(error), headers)


def add_handlers(app: FastAPI) -> None:
    """Render every expected error of the routes; what is unexpected goes on to the outer `ErrorBoundary`."""
    for kind in (AppError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)  # type: ignore[arg-type]  # None sends nothing, starlette allows it


def document(*errors: type[AppError], speaks_openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """Describe a route's errors for OpenAPI, from the classes themselves."""
    body: type[BaseModel] = openai.ErrorReply if speaks_openai else ErrorBody
    described: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        code = openai.code_of(error) if speaks_openai else error.code
        line = f"`{code}`: {(error.__doc__ or '').strip()}"
        before = described.get(error.status)
        text = f"{before['description']}\n\n{line}" if before else line
        described[error.status] = {"model": body, "description": text}
    # Named so that FastAPI does not add a 422 of its own, which no route answers.
    described["default"] = {"model": body, "description": "Any other error, in the same form."}
    return described
