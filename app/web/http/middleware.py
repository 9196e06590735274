"""ASGI middlewares around every request: its id, log line, metrics and errors, and the limits of its body.

Pure ASGI, because a middleware that runs the application in a task of its own hides the client's disconnect from it.
`app_factory.py` adds them in this order, outermost first:

    RequestLog      sees every response, so each has an id, a log line and metrics
    CORSMiddleware  only if origins are configured; answers preflights, which carry no key
    BodyLimits      bounds size and duration of what the inner layers read of the body
    ErrorBoundary   turns the exceptions of the inner layers into error responses
    DrainGate       refuses new work before any is done
    Authentication  runs before the body is read
"""

import asyncio
import re
import time
from collections.abc import Collection, Mapping
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.host import ModelHost
from app.errors import ClientDisconnected, DeadlineExceeded, PayloadTooLarge, ShuttingDown
from app.telemetry import Metrics
from app.telemetry.metrics import METHODS, OTHER, UNMATCHED
from app.types import Principal
from app.web.http.errors import ErrorRenderer, as_app_error
from app.web.http.private_api import route_path
from app.web.http.rate_limits import rate_headers
from app.web.http.security_headers import security_headers

_CLIENT_GONE = 499
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestLog:
    """Gives each request an id, and writes its log line and metrics once it has ended."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, served: Mapping[str, Collection[str]]) -> None:
        """Args: served: path template -> methods; a path without parameters names a request refused before routing."""
        self.app = app
        self.metrics = metrics
        self.served = dict(served)
        # Bound once: a lazy logger is put together again for each line.
        self._log = structlog.get_logger("llm_service").bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = _CLIENT_GONE
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"x-process-time", b"%.6f" % (time.perf_counter() - began)),
                    *await rate_headers(scope),
                    *security_headers(message.get("headers", ())),
                ]
            await send(message)

        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_named)
        finally:
            self._report(scope, status, time.perf_counter() - began)
            structlog.contextvars.unbind_contextvars("request_id")

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = self._template(scope)
        principal: Principal | None = scope["state"].get("principal")
        # A method that the route is not served by would make series that say nothing.
        served = method in self.served.get(route, ())
        self.metrics.http_done(method, route if served else None, status, seconds)
        self._log.info(
            f"{method} {route} - {status}",
            method=method,
            route=route,
            status_code=status,
            latency_ms=round(seconds * 1000, 2),
            request_id=scope["state"]["request_id"],
            key_id=principal.key_id if principal else None,
            **({"end_user": end_user} if (end_user := scope["state"].get("end_user")) else {}),
        )

    def _template(self, scope: Scope) -> str:
        if path := route_path(scope):
            return path
        return scope["path"] if scope["path"] in self.served else UNMATCHED


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return f"req_{uuid4().hex}"


class ErrorBoundary:
    """Renders the errors that the routes' own handlers do not, unless the response has begun.

    After that no error can be sent: the server closes the connection, and the client sees the response truncated.
    """

    def __init__(self, app: ASGIApp, *, renderer: ErrorRenderer) -> None:
        self.app = app
        self.renderer = renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def send_watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_watched)
        except ClientDisconnected:
            return
        except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
            shown = as_app_error(error)
            if not begun:
                await self.renderer.response(scope, shown)(scope, receive, send)


class DrainGate:
    """Refuses new work while the service drains, except probes and metrics."""

    def __init__(self, app: ASGIApp, *, host: ModelHost, always: Collection[str]) -> None:
        """Args: always: paths that are served while draining, too."""
        self.app = app
        self.host = host
        self.always = frozenset(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.host.draining and scope["path"] not in self.always:
            raise ShuttingDown()
        await self.app(scope, receive, send)


class BodyTooSlow(DeadlineExceeded):
    """The body did not arrive in time.  408 and not 504: it was the client that was slow."""

    status = 408


class BodyLimits:
    """Bounds the size of a body and the time it may take.

    A response before the whole body was read closes the connection: a client that sends the rest byte by byte must not
    occupy it.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float) -> None:
        """Args: timeout_seconds: from the first read of the body until its last byte."""
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(receive, _announced_bytes(scope), self)

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and not body.complete:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, body.receive, send_and_close)


class _Body:
    """Measures one request's body while it is received."""

    def __init__(self, receive: Receive, announced: int, limits: BodyLimits) -> None:
        self.complete = announced == 0
        self._receive = receive
        self._size = 0
        self._announced = announced
        self._limits = limits
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()
        self._check_size(self._announced)
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limits.timeout_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"The body did not arrive within {self._limits.timeout_seconds:g} seconds.") from None
        self._size += len(message.get("body", b""))
        self._check_size(self._size)
        self.complete = not message.get("more_body", False)
        return message

    def _check_size(self, size: int) -> None:
        limit = self._limits.max_bytes
        if size > limit:
            raise PayloadTooLarge(f"The body is longer than {limit} bytes.", details={"limit": limit})


def _announced_bytes(scope: Scope) -> int:
    """Return the body's length by its headers: 0 for no body, -1 if unknown before it is read."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return -1
    length = headers.get("content-length", "0")
    # More digits exceed every limit.
    return int(length[:20]) if length.isdecimal() else -1
