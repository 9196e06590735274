"""OpenAI's error envelope, with the types and codes that its clients branch on."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, Field

from app.errors import (
    AppError,
    ContextLengthExceeded,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    is_plain_name,
)

_WITHOUT_VERSION = ("/batches", "/chat/completions", "/completions", "/embeddings", "/files", "/models", "/responses")
PATH_PREFIXES = ("/v1", *_WITHOUT_VERSION)
"""Errors at these paths and below them have this envelope, except below the paths of other dialects.

OpenAI's clients also call paths that nothing serves, and, given a base URL without /v1, those without it.
"""

_INVALID = "invalid_request_error"
_TYPES_AND_CODES = {
    "validation_error": (_INVALID, _INVALID),
    "unauthorized": ("authentication_error", "invalid_api_key"),
    "forbidden": ("permission_error", "permission_denied"),
    "rate_limit_exceeded": ("rate_limit_error", "rate_limit_exceeded"),
    "quota_exceeded": ("insufficient_quota", "insufficient_quota"),
}
"""The service's code -> OpenAI's type and code; any other code stays, with the type that its status implies."""


class OpenAIErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=[_INVALID])
    param: str | None = Field(description="The field that is to blame.")
    code: str | None = Field(examples=["context_length_exceeded"])


class OpenAIErrorResponse(BaseModel):
    """OpenAI's error envelope."""

    error: OpenAIErrorObject


class OpenAIErrorFormat:
    """Writes errors as OpenAI does; an `ErrorFormat`."""

    schema = OpenAIErrorResponse

    def body(self, error: AppError, *, path: str, request_id: str) -> dict[str, Any]:
        return envelope(error, path)

    def headers(self, error: AppError) -> Mapping[str, str]:
        """Return OpenAI's hint that an exhausted quota is not worth a retry."""
        return {"x-should-retry": "false"} if error.code == "quota_exceeded" else {}

    def missing(self, path: str, served: Mapping[str, Collection[str]]) -> str:
        """Return what this dialect serves, and what may be wrong with the client's base URL."""
        if f"/v1{path}" in served:
            return f"This service has no {path}, but /v1{path}: let the client's base URL end in /v1."
        if path.startswith("/v1/v1/") and path.removeprefix("/v1") in served:
            return f"This service has no {path}, but {path.removeprefix('/v1')}: the client adds /v1 itself."
        return f"This service has no {_shown(path)}; it has {', '.join(sorted(served)).replace(':path', '')}."

    def code_of(self, kind: type[AppError]) -> str:
        return _type_and_code(kind, kind.code, kind.status)[1]


ERROR_FORMAT = OpenAIErrorFormat()


def envelope(error: AppError, path: str) -> dict[str, Any]:
    """Return the envelope of an error; the path decides which field is to blame for too long a prompt."""
    kind, code = _type_and_code(type(error), error.code, error.status)
    return OpenAIErrorResponse(
        error=OpenAIErrorObject(message=error.message, type=kind, param=_param(error, path), code=code)
    ).model_dump()


def _shown(path: str) -> str:
    """Return a path if it is plain words, as OpenAI's are; any other may hold what must not be repeated."""
    return path if all(map(is_plain_name, path.removeprefix("/v1/").split("/"))) else "such path"


def _type_and_code(kind: type[AppError], code: str, status: int) -> tuple[str, str]:
    """Return OpenAI's type and code; code and status are arguments since some errors set them per instance."""
    if issubclass(kind, ContextLengthExceeded | PromptTooLong):
        return _INVALID, "context_length_exceeded"
    if issubclass(kind, ModelNotFound):
        return _INVALID, "model_not_found"
    return _TYPES_AND_CODES.get(code, (_INVALID if status < 500 else "server_error", code))


def _param(error: AppError, path: str) -> str | None:
    if isinstance(error, ModelNotFound):
        return "model"
    if isinstance(error, ContextLengthExceeded):
        if path.startswith("/v1/embeddings"):
            return "input"
        return "messages" if path.startswith("/v1/chat") else "prompt"
    named = error.details.get("errors") if isinstance(error, Forbidden | InvalidRequest) else None
    field = named[0]["field"] if named else None
    return None if field in (None, "body") else str(field)
