"""Translates exceptions into error responses: status, headers and the JSON envelope of the path's dialect.

`ErrorRenderer` chooses the envelope by path prefix, because an error may come before any route is found: a wrong key, a
path that does not exist.  Input is never echoed, except for the name of an unknown field if that is a plain word.
"""

import math
import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Protocol

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from app import errors
from app.errors import AppError, is_plain_name
from app.web.http.private_api import route_path, served_methods

GENERATION_ERRORS: tuple[type[AppError], ...] = (
    errors.InvalidRequest,
    errors.ContextLengthExceeded,
    errors.PiiBlocked,
    errors.Unauthorized,
    errors.Forbidden,
    errors.ModelNotFound,
    errors.SessionUnreadable,
    errors.PayloadTooLarge,
    errors.UnsupportedMediaType,
    errors.RateLimited,
    errors.QuotaExceeded,
    errors.InternalError,
    errors.ServiceUnavailable,
    errors.DeadlineExceeded,
)
"""Errors of every route that generates, whatever its dialect."""

MAX_ERRORS_NAMED = 20
MAX_FIELD_CHARS = 80
MAX_REASON_CHARS = 200

_QUOTES_NO_INPUT = frozenset(
    """missing extra_forbidden string_type string_too_short string_too_long string_pattern_mismatch int_type float_type
    bool_type none_required list_type too_short too_long greater_than greater_than_equal less_than less_than_equal
    literal_error finite_number model_type model_attributes_type dict_type value_error unsupported_kind
    unsupported_value""".split()
)
"""pydantic's error types whose message quotes nothing of the input; of any other only the field is named."""

ERROR_CODE = "error_code"
"""Key in a request's state: the code of the error that is its response."""
KIND = "kind:"
"""Begins the tags of unions, which pydantic puts into locations between the names of fields."""

_log = structlog.get_logger("llm_service")


class ErrorBody(BaseModel):
    """The default error envelope."""

    error: str = Field(examples=["validation_error"])
    message: str
    details: dict[str, Any]
    timestamp: str = Field(examples=["2026-01-31T12:00:00Z"])
    request_id: str


def envelope(error: AppError, request_id: str) -> dict[str, Any]:
    """Return the default error envelope."""
    return ErrorBody(
        error=error.code,
        message=error.message,
        details=error.details,
        timestamp=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        request_id=request_id,
    ).model_dump()


class ErrorFormat(Protocol):
    """How a dialect writes errors."""

    @property
    def schema(self) -> type[BaseModel]:
        """The envelope's schema, for OpenAPI."""

    def body(self, error: AppError, *, path: str, request_id: str) -> dict[str, Any]:
        """Return the envelope of an error."""

    def headers(self, error: AppError) -> Mapping[str, str]:
        """Return headers that the dialect sends beside Retry-After and WWW-Authenticate."""

    def missing(self, path: str, served: Mapping[str, Collection[str]]) -> str:
        """Return a sentence about a path that is not served.  Args: served: the dialect's paths and their methods."""

    def code_of(self, kind: type[AppError]) -> str:
        """Return the code that errors of this class have in the dialect, for OpenAPI."""


class DefaultErrorFormat:
    """The service's own envelope; `ErrorFormat` of every path that no dialect has registered."""

    schema = ErrorBody

    def body(self, error: AppError, *, path: str, request_id: str) -> dict[str, Any]:
        return envelope(error, request_id)

    def headers(self, error: AppError) -> Mapping[str, str]:
        return {}

    def missing(self, path: str, served: Mapping[str, Collection[str]]) -> str:
        return "There is nothing at this path."

    def code_of(self, kind: type[AppError]) -> str:
        return kind.code


DEFAULT_FORMAT = DefaultErrorFormat()


class ErrorRenderer:
    """Builds error responses, each in the format registered for its path."""

    def __init__(self, formats: Mapping[str, ErrorFormat]) -> None:
        """Args: formats: path prefix -> format of that path and every path below it, whether a route exists or not.

        The longest prefix counts.
        """
        self._formats = dict(sorted(formats.items(), key=lambda item: -len(item[0])))
        self._served: Mapping[str, frozenset[str]] = {}

    def format_of(self, path: str) -> ErrorFormat:
        """Return the format of a path."""
        for prefix, error_format in self._formats.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                return error_format
        return DEFAULT_FORMAT

    def response(self, scope: Scope, error: AppError, headers: Mapping[str, str] | None = None) -> Response:
        """Return the response to a request that failed before its response began."""
        error_format = self.format_of(scope["path"])
        scope["state"][ERROR_CODE] = error.code
        return JSONResponse(
            error_format.body(error, path=scope["path"], request_id=scope["state"]["request_id"]),
            status_code=error.status,
            headers={**_standard_headers(error), **error_format.headers(error), **(headers or {})},
        )

    def register_handlers(self, app: FastAPI) -> None:
        """Render every expected error of the routes; unexpected ones propagate to the outer `ErrorBoundary`."""
        self._served = served_methods(app)
        for kind in (AppError, RequestValidationError, HTTPException):
            # Returning None sends nothing; Starlette allows it.
            app.add_exception_handler(kind, self._handle)  # type: ignore[arg-type]

    async def _handle(self, request: Request, error: Exception) -> Response | None:
        if isinstance(error, errors.ClientDisconnected):
            return None
        if isinstance(error, HTTPException):
            return self._of_router(request.scope, error)
        return self.response(request.scope, as_app_error(error))

    def _of_router(self, scope: Scope, error: HTTPException) -> Response:
        """Return the response where the router found no route, or none of this method."""
        path, shown, headers = scope["path"], as_app_error(error), error.headers
        if error.status_code == HTTPStatus.NOT_FOUND:
            error_format = self.format_of(path)
            same = {each: methods for each, methods in self._served.items() if self.format_of(each) is error_format}
            shown = errors.NotFound(error_format.missing(path, same))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # The router names the methods of one of its routes only; a path may have several.
            allow = ", ".join(sorted(self._served.get(route_path(scope) or path, ())))
            shown.message, headers = f"This path is not served by this method, but by {allow}.", {"Allow": allow}
        return self.response(scope, shown, headers)


def _standard_headers(error: AppError) -> dict[str, str]:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def as_app_error(error: Exception) -> AppError:
    """Translate any exception into what a client may see of it; an unexpected one is logged here, and only here."""
    match error:
        case AppError():
            return error
        case RequestValidationError():
            return _from_validation(error.errors())
        case HTTPException():
            return _from_http(error)
    _log.error("Unexpected error", error=type(error).__name__, exception=format_traceback(error))
    return errors.InternalError("The service failed. If you report this, name the request id.")


def format_traceback(error: BaseException) -> str:
    """Format an exception's frames and causes without its message, which may quote what a client sent."""
    blocks: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        blocks.append("".join(traceback.format_tb(cause.__traceback__)) + type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return "\ncaused by:\n".join(blocks)


def _from_validation(found: Sequence[Any]) -> errors.InvalidRequest:
    named = [_named(item) for item in found[:MAX_ERRORS_NAMED]]
    return errors.InvalidRequest(f"{named[0]['field']}: {named[0]['reason']}", details={"errors": named})


def _named(item: Mapping[str, Any]) -> dict[str, str]:
    """Return the field and what is wrong with it; an unknown field whose name may be a secret is only counted in."""
    location = item["loc"]
    if item["type"] == "extra_forbidden" and not is_plain_name(str(location[-1])):
        return {"field": _field(location[:-1]), "reason": "holds a field that does not exist, whose name is not shown"}
    return {"field": _field(location), "reason": _reason(item)}


def _field(location: Sequence[str | int]) -> str:
    # The first element says where the field was: body, path, query.
    parts = [str(part)[:MAX_FIELD_CHARS] for part in location[1:]]
    path = ".".join(re.sub(r"[^A-Za-z0-9_-]", "?", part) for part in parts if not part.startswith(KIND))
    return path[:MAX_FIELD_CHARS] or str(location[0])


def _reason(item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return "there is no such field"
    if item["type"] not in _QUOTES_NO_INPUT:
        return "is not valid"
    return str(item["msg"]).removeprefix("Value error, ")[:MAX_REASON_CHARS]


class _HttpError(AppError):
    """An error that the router raised, such as 405, with the router's status."""

    def __init__(self, status: int) -> None:
        phrase = HTTPStatus(status).phrase
        super().__init__(f"{phrase}.")
        self.status = status  # type: ignore[misc]  # per instance; other errors set it on the class
        self.code = phrase.lower().replace(" ", "_")  # type: ignore[misc]


def _from_http(error: HTTPException) -> AppError:
    match error.status_code:
        case 404:
            return errors.NotFound("There is nothing at this path.")
        case 413:
            return errors.PayloadTooLarge("The body is longer than this service reads.")
        case 415:
            return errors.UnsupportedMediaType("Send the body as application/json.")
    return _HttpError(error.status_code)


def error_responses(
    *kinds: type[AppError], error_format: ErrorFormat = DEFAULT_FORMAT
) -> dict[int | str, dict[str, Any]]:
    """Return a route's `responses` for OpenAPI, described by the docstrings of the error classes."""
    described: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        line = f"`{error_format.code_of(kind)}`: {(kind.__doc__ or '').strip()}"
        before = described.get(kind.status)
        text = f"{before['description']}\n\n{line}" if before else line
        described[kind.status] = {"model": error_format.schema, "description": text}
    # Named so that FastAPI does not add a 422 of its own, which no route answers.
    described["default"] = {"model": error_format.schema, "description": "Any other error, in the same form."}
    return described
