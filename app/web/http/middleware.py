"""Decide what surrounds every request: its id, its log line, its figures, its errors, and how much of a body is read.

Pure ASGI, because a middleware that runs the application in a task of its own hides the client's hang-up from it.
`assembly.py` puts them in this order, outermost first:

    RequestLog      sees every answer, so every answer has an id, a log line and a figure
    CORSMiddleware  only if origins are configured; answers preflights, which carry no key
    BodyLimits      counts and times what those inside it read of the body; reads nothing itself
    ErrorBoundary   turns what the others and the routes raise into the envelope
    DrainGate       refuses new work before any is done
    Authentication  before a byte of the body is read

Knows no route but its template.
"""

import asyncio
import re
import time
from collections.abc import Collection
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.host import EngineRegistry
from app.errors import ClientDisconnected, DeadlineExceeded, PayloadTooLarge, ShuttingDown
from app.telemetry import Metrics
from app.telemetry.metrics import METHODS, OTHER, UNMATCHED
from app.types import Principal
from app.web.http.errors import as_app_error, error_response
from app.web.http.rate_limits import rate_headers

_CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_log = structlog.get_logger("llm_service")


class RequestLog:
    """Names each request, and tells its story in one line once it has ended."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: Collection[str]) -> None:
        """Args: paths: routes without parameters; names the route of a request that was refused before it found one."""
        self.app = app
        self.metrics = metrics
        self.paths = frozenset(paths)

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
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Process-Time"] = f"{time.perf_counter() - began:.6f}"
                headers.update(await rate_headers(scope))
            await send(message)

        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self.app(scope, receive, send_named)
        finally:
            self._tell(scope, status, time.perf_counter() - began)
            structlog.contextvars.unbind_contextvars("request_id")

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = self._template(scope)
        principal: Principal | None = scope["state"].get("principal")
        self.metrics.http_done(method, route, status, seconds)
        _log.info(
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
        if route := scope.get("route"):
            return str(route.path)
        return scope["path"] if scope["path"] in self.paths else UNMATCHED


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).getlist("x-request-id")
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return f"req_{uuid4().hex}"


class ErrorBoundary:
    """Answers for whatever failed outside the routes' own error handling, as long as no answer has begun.

    Once one has, nothing can be said any more: the server closes the connection, and the client sees it cut short.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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
            answer = as_app_error(error)
            if not begun:
                await error_response(scope, answer)(scope, receive, send)


class DrainGate:
    """Refuses new work while the service drains; probes and figures go on."""

    def __init__(self, app: ASGIApp, *, engines: EngineRegistry, always: Collection[str]) -> None:
        """Args: always: paths that are answered to the end."""
        self.app = app
        self.engines = engines
        self.always = frozenset(always)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.engines.draining and scope["path"] not in self.always:
            raise ShuttingDown()
        await self.app(scope, receive, send)


class BodyTooSlow(DeadlineExceeded):
    """The body did not arrive in time.  408 and not 504: it was the client that was slow."""

    status = 408


class BodyLimits:
    """Bounds how long a body may be and how long it may take.

    An answer given before the whole body was read closes the connection: the rest is not worth waiting for, and a
    client that sends it byte by byte must not hold the connection.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float) -> None:
        """Args: timeout_seconds: from the first byte asked for until the last one has come."""
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
    """What has been read of one request's body."""

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
    """Return the body's length as its header says, 0 for none, and -1 if only reading will tell."""
    headers = Headers(scope=scope)
    if "transfer-encoding" in headers:
        return -1
    length = headers.get("content-length", "0")
    # Longer numbers than this are not worth reading exactly.
    return int(length[:20]) if length.isdecimal() else -1
