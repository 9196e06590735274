"""OpenAI's error envelope, with the types and codes that its clients branch on."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from app.errors import AppError, ContextLengthExceeded, Forbidden, InvalidRequest, ModelNotFound, PromptTooLong

_UNSERVED = """assistants audio batches containers conversations embeddings engines evals files fine_tuning images
    moderations realtime responses threads uploads vector_stores videos""".split()
PATH_PREFIXES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    *(f"/v1/{name}" for name in _UNSERVED),
)
"""Errors at these paths and below them have this envelope; OpenAI's clients also call those that nothing serves yet."""

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

    def code_of(self, kind: type[AppError]) -> str:
        return _type_and_code(kind, kind.code, kind.status)[1]


ERROR_FORMAT = OpenAIErrorFormat()


def envelope(error: AppError, path: str) -> dict[str, Any]:
    """Return the envelope of an error; the path decides which field is to blame for too long a prompt."""
    kind, code = _type_and_code(type(error), error.code, error.status)
    return OpenAIErrorResponse(
        error=OpenAIErrorObject(message=error.message, type=kind, param=_param(error, path), code=code)
    ).model_dump()


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
        return "messages" if path.startswith("/v1/chat") else "prompt"
    named = error.details.get("errors") if isinstance(error, Forbidden | InvalidRequest) else None
    field = named[0]["field"] if named else None
    return None if field in (None, "body") else str(field)
