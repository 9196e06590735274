"""How an error looks in OpenAI's dialect, with the types and codes that its clients branch on.

Knows paths, because an error may come before any route is found: a wrong key, a path that is not there.
"""

from typing import Any

from pydantic import BaseModel, Field

from app.errors import AppError, ContextLengthExceeded, InvalidRequest, ModelNotFound, PromptTooLong

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
"""These and whatever is below them speak this dialect."""

_INVALID = "invalid_request_error"
_NAMES = {
    "validation_error": (_INVALID, _INVALID),
    "unauthorized": ("authentication_error", "invalid_api_key"),
    "forbidden": ("permission_error", "permission_denied"),
    "rate_limit_exceeded": ("rate_limit_error", "rate_limit_exceeded"),
    "quota_exceeded": ("insufficient_quota", "insufficient_quota"),
}
"""Our code -> type and code here; any other code stays, under the type that its status says."""


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=[_INVALID])
    param: str | None = Field(description="The field that is to blame.")
    code: str | None = Field(examples=["context_length_exceeded"])


class ErrorReply(BaseModel):
    """What every error looks like."""

    error: ErrorObject


def speaks(path: str) -> bool:
    """Whether a path speaks this dialect, whether or not there is something at it."""
    return any(path == each or path.startswith(f"{each}/") for each in PATHS)


def envelope(error: AppError, path: str) -> dict[str, Any]:
    """Render an error."""
    kind, code = _names(type(error), error.code, error.status)
    return ErrorReply(
        error=ErrorObject(message=error.message, type=kind, param=_param(error, path), code=code)
    ).model_dump()


def headers(error: AppError) -> dict[str, str]:
    """Return what the clients are told beside the usual headers: a quota that is used up is not worth a retry."""
    return {"x-should-retry": "false"} if error.code == "quota_exceeded" else {}


def code_of(kind: type[AppError]) -> str:
    """Return the code that errors of this class have here."""
    return _names(kind, kind.code, kind.status)[1]


def _names(kind: type[AppError], code: str, status: int) -> tuple[str, str]:
    """Return type and code here of an error of ours; a few have code and status of their own beside their class."""
    if issubclass(kind, ContextLengthExceeded | PromptTooLong):
        return _INVALID, "context_length_exceeded"
    if issubclass(kind, ModelNotFound):
        return _INVALID, "model_not_found"
    return _NAMES.get(code, (_INVALID if status < 500 else "server_error", code))


def _param(error: AppError, path: str) -> str | None:
    if isinstance(error, ModelNotFound):
        return "model"
    if isinstance(error, ContextLengthExceeded):
        return "messages" if path.startswith("/v1/chat") else "prompt"
    named = error.details.get("errors") if isinstance(error, InvalidRequest) else None
    field = named[0]["field"] if named else None
    return None if field in (None, "body") else str(field)
