"""Completes the OpenAPI document with what the middlewares do to every operation.

FastAPI describes what a route declares: its body, its parameters and the errors of its own work.  Keys, limits of
bodies, the drain and the headers of responses are no route's, and are described here once for all.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI

from app.errors import (
    AppError,
    InternalError,
    InvalidRequest,
    PayloadTooLarge,
    RateLimited,
    ShuttingDown,
    StoreUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from app.web.http.body_limits import BodyTooSlow
from app.web.http.errors import ErrorFormat, ErrorRenderer, error_responses
from app.web.http.middleware import HeadTooLarge, TargetTooLong, VersionNotSupported

DESCRIPTION = """An OpenAI-style backend for Hugging Face models.

A path that is not in this document gets 404, and a method that a path does not have gets 405 with the right ones in the
header `Allow`; both in the error envelope of the paths beside it."""

_SCHEMES: Mapping[str, Any] = {
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "HTTPBearer": {"type": "http", "scheme": "bearer"},
}
_REQUEST_ID = {
    "description": "The client's own X-Request-ID, or a new one; the log has it too.",
    "required": True,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
}
_RETRY_AFTER = {
    "description": "Seconds until the same request may succeed.",
    "required": True,
    "schema": {"type": "integer", "minimum": 1},
}
_CHALLENGE = {"required": True, "schema": {"type": "string", "const": "Bearer"}}
_HEADERS: Mapping[str, Mapping[str, Any]] = {
    "401": {"WWW-Authenticate": _CHALLENGE},
    "429": {"Retry-After": _RETRY_AFTER},
    "503": {"Retry-After": _RETRY_AFTER},
}


class DocumentedApp(FastAPI):
    """A FastAPI application whose document is complete."""

    renderer: ErrorRenderer
    public: Collection[str]
    """Exact paths that need no key."""
    optional: Collection[str]
    """Exact paths that need no key, but say more to a caller with one."""
    always: Collection[str]
    """Exact paths that are served while the service drains."""

    def openapi(self) -> dict[str, Any]:
        complete = self.openapi_schema is not None
        document: dict[str, Any] = super().openapi()
        if not complete:
            components = document.setdefault("components", {})
            components["securitySchemes"] = dict(_SCHEMES)
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    self._complete(path, operation)
            for unused in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(unused, None)
            _write_bounds_as_integers(document)
        return document

    def _complete(self, path: str, operation: dict[str, Any]) -> None:
        public = path in self.public
        schemes: list[dict[str, Any]] = [{name: []} for name in _SCHEMES]
        operation["security"] = [] if public else [{}, *schemes] if path in self.optional else schemes
        error_format = self.renderer.format_of(path)
        responses: dict[str, Any] = operation["responses"]
        # The status of a wrong body or parameter is 400 here.
        for unused in ("422", "default"):
            responses.pop(unused, None)
        for status, described in _edge_responses(
            error_format, public=public, always=path in self.always, body="requestBody" in operation
        ).items():
            responses.setdefault(status, described)
        for status, response in responses.items():
            response["headers"] = {
                "X-Request-ID": _REQUEST_ID,
                **_HEADERS.get(status, {}),
                **response.get("headers", {}),
            }
        operation["responses"] = dict(sorted(responses.items()))


def _write_bounds_as_integers(value: Any) -> None:
    """Write 8.0 as 8: FastAPI reads every bound as a float, and clients disagree on what 9.223372036854776e18 is."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, float) and inner.is_integer():
            value[key] = int(inner)
        elif isinstance(inner, (dict, list)):
            _write_bounds_as_integers(inner)


def _edge_responses(error_format: ErrorFormat, *, public: bool, always: bool, body: bool) -> dict[str, Any]:
    """Return the refusals that a request may get before its route, and the failure that any may get."""
    kinds: list[type[AppError]] = [InvalidRequest, TargetTooLong, HeadTooLarge, InternalError, VersionNotSupported]
    if not public:
        kinds += [Unauthorized, RateLimited, StoreUnavailable]
    if not always:
        kinds.append(ShuttingDown)
    if body:
        kinds += [BodyTooSlow, PayloadTooLarge, UnsupportedMediaType]
    schema = {"$ref": f"#/components/schemas/{error_format.schema.__name__}"}
    described = error_responses(*kinds, error_format=error_format)
    return {
        str(status): {"description": one["description"], "content": {"application/json": {"schema": schema}}}
        for status, one in described.items()
        if status != "default"
    }
