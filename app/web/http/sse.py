"""Sends a generation as server-sent events, or collects it, and cancels it as soon as its client disconnects.

What the events contain is the stream encoder's choice.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import anyio
import structlog
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.errors import AppError, ClientDisconnected
from app.events import Event, Finished, Response, Started, collect
from app.web.http.errors import as_app_error
from app.web.http.json_encoding import encode_json
from app.web.http.private_api import SendTimeoutError, SseResponse

PING_SECONDS = 15.0
"""Below the idle timeouts of the common proxies, which start at 30 s."""
SEND_TIMEOUT_SECONDS = 15.0
"""How long a client may leave its receive buffer full before its stream is closed."""
CLOSE_SECONDS = 5.0
"""A generation is cancelled within one token; this bounds the wait if the engine hangs."""
READ_AHEAD = 16
"""Events buffered for a slow client before the generation waits for it."""

UNWATCHED_SECONDS = 0.02
"""How long a response may take before its connection is watched for a disconnect."""


def streamed(*names: str) -> dict[int | str, dict[str, Any]]:
    """Return the part of a route's `responses` for OpenAPI that says that it can stream.

    Args: names: those that its events have; none for a stream of nameless ones.
    """
    fields: dict[str, Any] = {"data": {"type": "string", "description": "One JSON object, or `[DONE]`."}}
    if names:
        fields = {"event": {"type": "string", "enum": list(names)}, "data": {"type": "string"}}
    schema = {"type": "object", "description": "One event of the stream.", "required": [*fields], "properties": fields}
    return {
        200: {
            "description": "The whole response; with `stream` the same as server-sent events.",
            "content": {"text/event-stream": {"schema": schema}},
        }
    }


_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")


class StreamEncoder(Protocol):
    """Encodes the events of one generation as SSE frames."""

    def encode(self, event: Event) -> bytes:
        """Return the frames of an event, or no bytes for an event without frames."""

    def encode_error(self, error: AppError) -> bytes:
        """Return the frames that end a stream which failed midway."""


_T = TypeVar("_T")
_log = structlog.get_logger("llm_service")


class EventStream(SseResponse):
    """Streams the events of a generation, and closes the generation however the stream ends.

    A separate task reads the events.  The library ends a stream by cancelling a task group, which interrupts every
    `await` of a cleanup, again and again; a separate task is cancelled once and can free what the generation holds.
    """

    def __init__(
        self,
        started: Started,
        events: AsyncGenerator[Event, None],
        encoder: StreamEncoder,
        *,
        headers: Mapping[str, str] | None = None,
        on_error: Callable[[AppError], None] = lambda error: None,
        ping_seconds: float = PING_SECONDS,
        send_timeout_seconds: float = SEND_TIMEOUT_SECONDS,
    ) -> None:
        """Args:
        started: the generation's first event.
        events: the events after it.
        on_error: is called with the error that ends the generation midway.
        """
        self._events = events
        self._on_error = on_error
        self._encoder = encoder
        self._reading: asyncio.Task[None]
        # A comment at once shows proxies and clients that the stream lives, however long the first token takes.
        # The opening is encoded before any later event is read, because encoders must see events in their order.
        self._buffer = [_KEEP_ALIVE.encode() + encoder.encode(started)]
        """Frames that have not been sent."""
        self._has_frames = asyncio.Event()
        self._has_frames.set()
        self._has_capacity = asyncio.Event()
        self._finished = False
        super().__init__(
            self._frames(),
            headers={"Cache-Control": "no-store", **(headers or {})},
            ping=ping_seconds,
            ping_message_factory=lambda: _KEEP_ALIVE,
            send_timeout=send_timeout_seconds,
            sep="\n",
        )
        # The library's is keep-alive; whether the connection is kept the server says.
        del self.headers["Connection"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._reading = asyncio.create_task(self._read())
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.warning("A client did not read its stream and was cut off", seconds=self.send_timeout)
        finally:
            await self._close()

    async def _read(self) -> None:
        try:
            async for event in self._events:
                self._finished = isinstance(event, Finished)
                if frames := self._encoder.encode(event):
                    self._buffer.append(frames)
                    self._has_frames.set()
                while len(self._buffer) >= READ_AHEAD:
                    self._has_capacity.clear()
                    await self._has_capacity.wait()
        except AppError as error:
            self._on_error(error)
            raise
        finally:
            self._has_frames.set()

    async def _frames(self) -> AsyncIterator[bytes]:
        """Yield frames; those that are ready at the same moment leave together."""
        try:
            while not self._reading.done() or self._buffer:
                await self._has_frames.wait()
                self._has_frames.clear()
                ready = b"".join(self._buffer)
                self._buffer.clear()
                self._has_capacity.set()
                if ready:
                    yield ready
            await self._reading
            if not self._finished:
                raise RuntimeError("a generation ended without its last event")
        except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
            shown = as_app_error(error)
            if not self._finished:
                yield self._encoder.encode_error(shown)

    async def _close(self) -> None:
        self._reading.cancel()
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await asyncio.wait({self._reading})
            # Unstarted or unfinished if the reader was cancelled while its buffer was full.
            await self._events.aclose()
        # A client that still reads has got the error; unretrieved, the loop would log it with its message.
        with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            self._reading.exception()


class FrameStream(SseResponse):
    """Streams frames that somebody else's work produces; the work goes on when the client hangs up."""

    def __init__(self, frames: AsyncIterator[bytes], *, ping_seconds: float = PING_SECONDS) -> None:
        super().__init__(
            frames,
            headers={"Cache-Control": "no-store"},
            ping=ping_seconds,
            ping_message_factory=lambda: _KEEP_ALIVE,
            send_timeout=SEND_TIMEOUT_SECONDS,
            sep="\n",
        )
        del self.headers["Connection"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(SendTimeoutError):
            await super().__call__(scope, receive, send)


def frame(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one server-sent event."""
    head = f"event: {name}\ndata: ".encode() if name else b"data: "
    return b"%b%b\n\n" % (head, encode_json(data))


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await the work, but cancel it as soon as the client disconnects.

    The body must have been read before, so that the next message is the disconnect.

    Raises: ClientDisconnected: nobody waits for the response.
    """
    working = asyncio.ensure_future(work)
    tasks: set[asyncio.Future[Any]] = {working}
    try:
        # Most refusals and cached responses are ready sooner than a disconnect could matter.
        await asyncio.wait(tasks, timeout=UNWATCHED_SECONDS)
        if not working.done():
            tasks.add(asyncio.ensure_future(_disconnected(request)))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected("The client hung up before its answer was ready.")
        return working.result()
    finally:
        # A finished task is left alone: awaiting it again would cut the traceback of its error.
        if pending := {task for task in tasks if not task.done()}:
            for task in pending:
                task.add_done_callback(_retrieve)
                task.cancel()
            # Not each task itself: another cancellation would go on to it, and interrupt what it frees.
            await asyncio.wait(pending)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Take the error of a task that nobody waits for, which the loop would log with its message."""
    if not task.cancelled():
        task.exception()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def wait_for_start(request: Request, events: AsyncGenerator[Event, None]) -> Started:
    """Wait for a generation's first event, so that a refusal is still an ordinary error response.

    Raises: AppError: the request is wrong or cannot be taken.
    """

    async def first() -> Started:
        event = await anext(events)
        if not isinstance(event, Started):
            raise TypeError("a generation begins with Started")
        return event

    return await cancel_on_disconnect(request, first())


async def collect_response(request: Request, events: AsyncGenerator[Event, None]) -> Response:
    """Read a generation to its end, unless the client disconnects before.

    Raises: AppError: what ended the generation instead.
    """

    async def read() -> Response:
        async with aclosing(events):
            return await collect(events)

    return await cancel_on_disconnect(request, read())
