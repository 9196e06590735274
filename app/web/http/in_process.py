"""Sends a request to a route of this application without a socket, as somebody whose key is known already.

The request passes what a live one passes behind the middlewares: admission, validation, the service and the encoder of
its dialect.  So its response is what the route would have sent.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

import structlog
from starlette.types import Message

from app.errors import AppError
from app.types import BACKGROUND_PRIORITY, Limits, Principal
from app.web.http.dependencies import BASE_PRIORITY
from app.web.http.errors import as_app_error
from app.web.http.openapi import DocumentedApp


@dataclass(frozen=True, slots=True)
class InProcessResponse:
    """A response, and the error that it renders."""

    status: int
    body: bytes
    """JSON."""
    error: AppError | None = None


async def post(
    app: DocumentedApp, path: str, body: bytes, *, principal: Principal, request_id: str
) -> InProcessResponse:
    """Send a JSON body to a route in the background of live traffic; cancelling this cancels the request.

    It counts against no limit of its caller's but the monthly tokens.
    """
    structlog.contextvars.bind_contextvars(request_id=request_id)
    limits = Limits(monthly_tokens=principal.limits.monthly_tokens)
    scope = _scope(app, path, body, replace(principal, limits=limits), request_id)
    status, parts, waiting = 500, list[bytes](), [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await asyncio.Event().wait()  # nobody hangs up
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app.router(scope, receive, send)
    except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
        return refused(app, path, as_app_error(error), request_id=request_id)
    return InProcessResponse(status, b"".join(parts))


def refused(app: DocumentedApp, path: str, error: AppError, *, request_id: str) -> InProcessResponse:
    """Return the response that a route sends for an error."""
    response = app.renderer.response({"path": path, "state": {"request_id": request_id}}, error)
    return InProcessResponse(response.status_code, bytes(response.body), error)


def _scope(app: DocumentedApp, path: str, body: bytes, principal: Principal, request_id: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "app": app,
        "state": {"principal": principal, "request_id": request_id, BASE_PRIORITY: BACKGROUND_PRIORITY},
    }
