"""ASGI middlewares around every request: its id, log line, metrics and errors, and the limits of its head.

Pure ASGI, because a middleware that runs the application in a task of its own hides the client's disconnect from it.
`app_factory.py` adds them in this order, outermost first; those in parentheses have files of their own:

    RequestLog           sees every response, so each has an id, a log line and metrics
    (CrossOriginAccess)  only if origins are configured; answers preflights, which carry no key
    (BodyLimits)         bounds size and duration of what the inner layers read of the body
    ErrorBoundary        turns the exceptions of the inner layers into error responses
    HeadChecks           refuses heads that are too large or that HTTP/1.1 forbids; answers HEAD as GET
    DrainGate            refuses new work before any is done
    (Authentication)     runs before the body is read
"""

import re
import time
from collections.abc import Collection, Mapping
from uuid import uuid4

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.config.sections import MIN_KEY_CHARS
from app.engine.host import ModelHost
from app.errors import AppError, ClientDisconnected, InvalidRequest, ShuttingDown
from app.telemetry import Metrics
from app.telemetry.metrics import METHODS, OTHER, UNMATCHED
from app.telemetry.tracing import NO_TRACER, TRACE_PARENT, RequestSpan, Tracer
from app.types import Principal
from app.web.http.errors import ERROR_CODE, ErrorRenderer, as_app_error
from app.web.http.private_api import route_path
from app.web.http.rate_limits import rate_headers
from app.web.http.security_headers import security_headers
from app.web.http.validation import ignored_fields_header

_CLIENT_GONE = 499
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestLog:
    """Gives each request an id, and writes its log line and metrics once it has ended."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        served: Mapping[str, Collection[str]],
        tracer: Tracer = NO_TRACER,
        untraced: Collection[str] = (),
    ) -> None:
        """Args:
        served: path template -> methods; a path without parameters names a request refused before routing.
        tracer: makes the span that all others of a request belong to.
        untraced: exact paths for which it makes none.
        """
        self.app = app
        self.metrics = metrics
        self.served = dict(served)
        self.tracer = tracer
        self.untraced = frozenset(untraced)
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
                    *ignored_fields_header(scope),
                    *security_headers(message.get("headers", ())),
                ]
            await send(message)

        span = None if scope["path"] in self.untraced else self.tracer.begin(scope["headers"])
        trace_id = _trace_id(scope) if span is None else span.trace_id
        named = {"request_id": request_id} if trace_id is None else {"request_id": request_id, "trace_id": trace_id}
        structlog.contextvars.bind_contextvars(**named)
        try:
            await self.app(scope, receive, send_named)
        finally:
            self._report(scope, status, time.perf_counter() - began, span)
            structlog.contextvars.unbind_contextvars(*named)

    def _report(self, scope: Scope, status: int, seconds: float, span: RequestSpan | None) -> None:
        method = scope["method"] if scope["method"] in METHODS else OTHER
        route = self._template(scope)
        principal: Principal | None = scope["state"].get("principal")
        # A method that the route is not served by would make series that say nothing.
        served = method in self.served.get(route, ())
        error: str | None = scope["state"].get(ERROR_CODE)
        self.metrics.http_done(method, route if served else None, status, seconds, error)
        if span is not None:
            span.end(method, route if served else None, None if status == _CLIENT_GONE else status)
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
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) and not _holds_key(given[0], scope):
        return str(given[0], "ascii")
    return str(uuid4())


def _trace_id(scope: Scope) -> str | None:
    """Return the trace that a request says it belongs to, for the log of a service that sends no traces itself."""
    given = [value for name, value in scope["headers"] if name == b"traceparent"]
    found = TRACE_PARENT.fullmatch(given[0]) if len(given) == 1 else None
    return str(found[1], "ascii") if found else None


def _holds_key(request_id: bytes, scope: Scope) -> bool:
    """Return whether a client's request id, which is logged, is an API key in the wrong header."""
    return b"llm_" in request_id or (
        # A shorter one is no key, but stands in many by chance.
        len(request_id) >= MIN_KEY_CHARS
        and any(request_id in value for name, value in scope["headers"] if name in (b"x-api-key", b"authorization"))
    )


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


MAX_HEAD_BYTES = 64 * 1024
"""Bytes of the headers of a request; the sum of all fields may be as long as that, but no more."""
MAX_HEADERS = 128
MAX_TARGET_BYTES = 8 * 1024
"""Bytes of a request's path and query."""
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


class HeadTooLarge(AppError):
    """The headers of the request are more, or longer, than the service reads."""

    status, code = 431, "headers_too_large"

    def __init__(self) -> None:
        super().__init__(
            f"The request has more than {MAX_HEADERS} headers, or more than {MAX_HEAD_BYTES} bytes of them."
        )


class TargetTooLong(AppError):
    """The path and query of the request are longer than the service reads."""

    status, code = 414, "uri_too_long"


class VersionNotSupported(AppError):
    """The request is of another version of HTTP than 1.0 and 1.1."""

    status, code = 505, "http_version_not_supported"


class HeadChecks:
    """Refuses a head that is too large, and what a server of HTTP/1.1 has to refuse although it can be parsed.

    HEAD is answered by the route of GET, as HTTP has it; the router knows only the methods that routes name.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str] = (), any_host: Collection[str] = ()) -> None:
        """Args:
        hosts: names that the header Host may have, in lower case, *.name for all below one; none: any.
        any_host: exact paths for which it may be any, as probes send an address.
        """
        self.app = app
        self.hosts = hosts
        self.any_host = frozenset(any_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _check_head(scope)
            if self.hosts and scope["path"] not in self.any_host:
                _check_host(scope, self.hosts)
            if scope["method"] == "HEAD":
                await self._get(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _get(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send_without_body)
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]  # for the log


def _check_head(scope: Scope) -> None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if scope["http_version"] not in ("1.1", "1.0"):
        raise VersionNotSupported("Send the request as HTTP/1.1.")
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET_BYTES:
        raise TargetTooLong(f"Path and query are longer than {MAX_TARGET_BYTES} bytes.")
    if len(headers) > MAX_HEADERS or sum([len(name) + len(value) for name, value in headers]) > MAX_HEAD_BYTES:
        raise HeadTooLarge
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1") or not all(map(_HOST.fullmatch, hosts)):
        raise InvalidRequest.of_field("Host", "must be given once, as a name or address")


def _check_host(scope: Scope, hosts: Collection[str]) -> None:
    """Raises: InvalidRequest: the request is for a host that is not listed."""
    given = next((str(value, "ascii") for name, value in scope["headers"] if name == b"host"), "").lower()
    name = re.sub(r":[0-9]*$", "", given)
    if not any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in hosts):
        raise InvalidRequest.of_field("Host", "names a host for which this service does not answer")


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
