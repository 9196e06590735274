"""The middleware that bounds the body of a request: its bytes, and how long it may take to arrive."""

import asyncio
import sys
from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import DeadlineExceeded, PayloadTooLarge


class BodyTooSlow(DeadlineExceeded):
    """The body did not arrive in time.  408 and not 504: it was the client that was slow."""

    status = 408


class BodyLimits:
    """Bounds the size of a body and the time it may take, whatever the headers say of it.

    A response before the whole body was read closes the connection: a client that sends the rest byte by byte must not
    occupy it.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float, uploads: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """Args:
        timeout_seconds: from the end of the head until the last byte of the body.
        uploads: exact path -> its own `max_bytes`; as many times as that is more, a body may take longer.
        """
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_seconds = timeout_seconds
        self.uploads = dict(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.uploads.get(scope["path"], self.max_bytes)
        seconds = self.timeout_seconds * max(1.0, most / self.max_bytes)
        body = _Body(receive, _announced_bytes(scope["headers"]), most, seconds)

        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start" and not body.complete:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, body.receive, send_and_close)


class _Body:
    """Measures one request's body while it is received."""

    def __init__(self, receive: Receive, announced: int | None, max_bytes: int, seconds: float) -> None:
        self.complete = announced == 0
        """Whether all of it has been received; one of no bytes is read only by those who want to."""
        self._receive = receive
        self._size = 0
        self._announced = announced or 0
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._ended = False
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()
        self._check_size(self._announced)
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(f"The body did not arrive within {self._seconds:g} seconds.") from None
        self._size += len(message.get("body", b""))
        self._check_size(self._size)
        self._ended = not message.get("more_body", False)
        self.complete = self.complete or self._ended
        return message

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            limit = self._max_bytes
            raise PayloadTooLarge(f"The body is longer than {limit} bytes.", details={"limit": limit})


def _announced_bytes(headers: list[tuple[bytes, bytes]]) -> int | None:
    """Return the body's length by its headers; None if it is not clear before the body has been read."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return None
    lengths = {value for name, value in headers if name == b"content-length"}
    if not lengths:
        return 0
    digits = lengths.pop().lstrip(b"0") or b"0"
    if lengths or not digits.isdigit():
        return None
    return int(digits) if len(digits) < 20 else sys.maxsize
