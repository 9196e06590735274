"""The server's HTTP/1.1 protocol: uvicorn's, with bounds on what a connection may cost and a stricter reading of heads.

What it takes from uvicorn beyond documented interfaces is tested in `tests/unit/web/test_protocol.py`.
"""

import asyncio
from typing import Any
from uuid import uuid4

import httptools
import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.errors import AppError, DeadlineExceeded, InvalidRequest, RateLimited, ServiceUnavailable
from app.web.http.connections import SWEEP_SECONDS, WRITE_BYTES, ConnectionGuard, Rank, TooManyConnections
from app.web.http.errors import envelope
from app.web.http.middleware import MAX_HEAD_BYTES, HeadTooLarge
from app.web.http.rate_limits import client_address
from app.web.http.security_headers import security_headers

MAX_PIPELINED = 64
"""Requests of one connection that may wait for the response to an earlier one."""
MAX_QUEUED_BYTES = 64 * 1024
"""Bytes that are read behind a request being answered; with more, a hang-up is noticed only when something is sent."""
MAX_DISCARDED_BYTES = 16 * 1024 * 1024
"""Bytes of a refused request that are read and discarded before the connection is cut off."""

_NOT_HTTP = "The request is not valid HTTP/1.1."


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, with the guard of all connections of the server."""

    def __init__(
        self, app: FastAPI, guard: ConnectionGuard, *, trusted_proxies: tuple[str, ...] = (), **options: Any
    ) -> None:
        super().__init__(
            app,
            http=GuardedProtocol,
            # No route speaks it: an offer to upgrade is ignored.
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            forwarded_allow_ips=list(trusted_proxies),
            proxy_headers=bool(trusted_proxies),
            backlog=guard.limits.backlog,
            **options,
        )
        self.guard = guard
        self.trusted = ProxyHeadersMiddleware(_no_app, list(trusted_proxies)).trusted_hosts
        self._sweeping: asyncio.TimerHandle | None = None

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Check deadlines from now on, until no connection is left."""
        if self._sweeping is None:
            self._sweeping = loop.call_later(SWEEP_SECONDS, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeping = None
        try:
            self.guard.sweep()
        finally:
            if not self.guard.idle:
                self.watch(loop)


async def _no_app(*_: Any) -> None:
    """Stand in for the application that a middleware wraps, where only its list of proxies is wanted."""


class _LingeringTransport:
    """A transport whose `close` lets the client read the answer before the connection goes."""

    def __init__(self, transport: asyncio.Transport, protocol: "GuardedProtocol") -> None:
        self._transport = transport
        self._protocol = protocol
        self.write = transport.write

    def close(self) -> None:
        self._protocol.close_lingering()

    def is_closing(self) -> bool:
        return self._protocol.closing or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _UnchunkedCycle(RequestResponseCycle):
    """A request of HTTP/1.0, which has no chunks: a response without a length ends with the connection."""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = None if has_length else False
        elif self.chunked_encoding is False and not self.expected_content_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    Differs from uvicorn's in that

    - it has a place from the guard, and a deadline for each head, each pause of writing, and closing;
    - a head has at most `MAX_HEAD_BYTES`, and what it refuses has the error envelope;
    - trailers of a chunked body are dropped: they came after the checks of the head, and are no headers; they, and what
      frames the chunks, have no more bytes between two parts of a body than a head;
    - a response of HTTP/1.0 is never chunked;
    - an offer to upgrade the protocol is ignored, and the connection goes on;
    - a hang-up reaches the request being answered, also while another is queued behind it;
    - a client that ends what it sends together with its request is answered, if that does not take long.
    """

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._owner = config
        self._guard = config.guard
        self.address, self.trusted = "unknown", False
        self.closing = False
        """Whether it is being closed; what the client still sends is discarded."""
        self._raw: asyncio.Transport
        self._in_head = True
        """Whether the next bytes belong to a head, and not to a body."""
        self._begun = False
        """Whether a part of a request has come, and not yet all of it."""
        self._head_bytes = 0
        """Bytes since the last head or part of a body: of a head, or of trailers, which the parser collects too."""
        self._queued_bytes = 0
        self._discarded = 0
        self._broken: AppError | None = None
        """What is wrong with the input that follows the requests being answered; it is answered after them."""
        self._serving: RequestResponseCycle | None = None
        self._half_closed = False
        self._known = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._raw = transport
        self.transport = _LingeringTransport(transport, self)  # type: ignore[assignment]
        if self.client is not None:
            self.address = client_address({"client": self.client})
            self.trusted = self.client[0] in self._owner.trusted
        self._owner.watch(self.loop)
        try:
            self._guard.add(self)
        except TooManyConnections as error:
            self._begun = True  # it may have sent a request already
            self._refuse(_no_place(of_address=error.of_address))

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.remove(self)
        if self._serving is not None and not self._serving.response_complete:
            self._serving.disconnected = True
            self._serving.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        # The cycle refers to the transport, and that to this protocol: only a collection would free them.
        self.transport = self._raw
        self.cycle = self._serving = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own may return it
        """Give the place up, unless the client may only have ended what it sends; False has asyncio close all."""
        broken = self._begun or self.closing or self._broken is not None
        if not broken and self._serving is not None and not self._serving.response_started:
            self._half_closed = True
            self.loop.call_later(self._guard.limits.half_close_seconds, self._end_half_closed, self._serving)
        elif not self.closing:
            self.closing = True
            self._guard.closing(self, lingers=False)
        return self._half_closed

    def _end_half_closed(self, served: RequestResponseCycle) -> None:
        """Take a client that has ended what it sends for one that has hung up, if nothing has been sent to it."""
        if served is self._serving and not served.response_started:
            self.close_lingering()

    def unsent(self) -> int:
        return self._raw.get_write_buffer_size()

    def abort(self) -> None:
        """Cut the connection off."""
        self._raw.abort()

    def refuse_slow_head(self) -> None:
        if self._begun:
            seconds = self._guard.limits.head_seconds
            self._refuse(HeadTooSlow(f"The head of the request did not arrive within {seconds:g} seconds."))
        else:
            self.close_lingering()

    # --- Reading ---

    def data_received(self, data: bytes) -> None:
        if self.closing or self._broken is not None:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.abort()
        else:
            self._read(data)

    def _read(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._begun = True
            excess = len(self.pipeline) > MAX_PIPELINED
            self._refuse(InvalidRequest("Too many requests without waiting for a response." if excess else _NOT_HTTP))
            return
        if self.closing:
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge())
        elif self._serving is not None:
            self._rank_serving(self._serving)
            self._limit_queued(len(data))
        elif self._in_head:
            # Also where nothing but empty lines has come, with which the parser does not begin a request.
            self._guard.head_begun(self)

    def _limit_queued(self, count: int) -> None:
        """Read on behind a request being answered, which uvicorn does not: who does not read sees no hang-up."""
        if self.pipeline:
            self._queued_bytes += count
            if self._queued_bytes <= MAX_QUEUED_BYTES:
                self.flow.resume_reading()
            else:
                self.flow.pause_reading()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = self._without_offer() + data[offer.args[0] :]
                self._new_parser()
            else:
                return

    def _new_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn has it: what follows `Connection: close` is no error of the request before.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _without_offer(self) -> bytes:
        """Return the head once more without its offer; with it the parser takes the body for the other protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join((*lines, b"", b""))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")  # the parser stops, and its error is answered
            return
        self._in_head = False
        self._head_bytes = 0
        self._guard.head_done(self)
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnchunkedCycle  # before its task runs
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError("too many pipelined requests")  # the parser stops, and its error is answered

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_head, self._begun = True, False
        self._head_bytes = 0

    # --- Answering ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._serving = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        served, self._serving = self._serving, None
        if served is not None and "principal" in served.scope["state"]:
            self._known = True
        if self._broken is not None and self.pipeline and self.pipeline[0][0].more_body:
            self.pipeline.popleft()  # the newest one is what is broken
        super().on_response_complete()
        if not self.pipeline:
            self._queued_bytes = 0
        if not self.closing:
            self._after_response()

    def _after_response(self) -> None:
        """Rank the connection by what follows the response that has been sent; nothing does if that closed it."""
        if self.closing or self._raw.is_closing():
            return
        if self._serving is not None:
            self._rank_serving(self._serving)
        elif self._broken is not None:
            self._refuse(self._broken)
        elif self._half_closed:
            self.close_lingering()
        else:
            self._guard.rank(self, Rank.KNOWN if self._known or self.trusted else Rank.UNKNOWN)
            if self._begun and self._in_head:
                self._unset_keepalive_if_required()  # it is not idle
                self._guard.head_begun(self)

    def _rank_serving(self, cycle: RequestResponseCycle) -> None:
        self._guard.rank(self, Rank.SENDING if cycle.more_body else Rank.SERVED)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._guard.write_paused(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._guard.write_resumed(self)

    # --- Closing ---

    def _refuse(self, error: AppError) -> None:
        """Answer with an error without the application, after the requests that it is answering, and close."""
        serving = self._serving
        if serving is not None and not serving.more_body:
            self._broken = error
            self.flow.resume_reading()  # and discards
            return
        if serving is not None:  # its body is what is wrong
            serving.disconnected = True
            serving.message_event.set()
        if serving is None or not serving.response_started:
            request_id = str(uuid4())
            body = JSONResponse(envelope(error, request_id))
            headers = [*self.server_state.default_headers, *body.raw_headers, (b"connection", b"close")]
            headers += [(b"x-request-id", request_id.encode()), *security_headers(body.raw_headers)]
            if error.retry_after is not None:
                headers.append((b"retry-after", b"%d" % error.retry_after))
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self._raw.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(body.body))
        self.close_lingering()

    def close_lingering(self) -> None:
        """Send what is buffered and close.

        While the client is still sending, its input is discarded for a moment first: closing a socket with unread input
        resets the connection, and the client may lose the answer that is on its way.
        """
        if self.closing or self._raw.is_closing():
            return
        self.closing = True
        self._unset_keepalive_if_required()
        if self._begun and self._raw.can_write_eof():
            self.flow.resume_reading()
            self._raw.write_eof()
            self._guard.closing(self, lingers=self.unsent() <= WRITE_BYTES)
        else:
            self._raw.close()
            self._guard.closing(self, lingers=False)


class HeadTooSlow(DeadlineExceeded):
    """The head of a request did not arrive in time."""

    status = 408


def _no_place(*, of_address: bool) -> AppError:
    if of_address:
        return RateLimited("Your address has too many requests running at once.", retry_after=1)
    return ServiceUnavailable("The service has as many connections as it can take; try again in a moment.")
