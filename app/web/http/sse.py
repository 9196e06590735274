"""Sends a generation as server-sent events, or collects it, and cancels it as soon as its client disconnects.

What the events contain is the stream encoder's choice.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import structlog
from sse_starlette import ServerSentEvent
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

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


class FrameResponse(SseResponse, ABC):
    """Sends frames that a task of its own makes, until they end or the client hangs up.

    The response begins with the first frame: a failure before it is raised, and gets an ordinary error response.  A
    task of its own, because the library ends a stream by cancelling a task group, which interrupts every `await` of a
    cleanup, again and again; this one is cancelled once, and then has time to free what it holds.
    """

    def __init__(
        self, *, ping_seconds: float = PING_SECONDS, send_timeout_seconds: float = SEND_TIMEOUT_SECONDS
    ) -> None:
        super().__init__(
            self._ready_frames(),
            headers={"Cache-Control": "no-store"},
            ping=ping_seconds,
            ping_message_factory=lambda: _KEEP_ALIVE,
            send_timeout=send_timeout_seconds,
            sep="\n",
        )
        # The library's is keep-alive; whether the connection is kept the server says.
        del self.headers["Connection"]
        self._buffer = list[bytes]()
        """Frames that have not been sent."""
        self._has_frames = asyncio.Event()
        self._has_capacity = asyncio.Event()
        self._opened = self._begun = False
        """Whether there has been a frame, and whether the response has begun."""
        self._making: asyncio.Task[None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Begun before anything is known of the response: what it needs is then not in the way of its first token.
        self._making = asyncio.create_task(self._make())
        try:
            await super().__call__(scope, receive, self._from_first_frame(send))
            if not self._begun:
                if not self._making.done():
                    raise ClientDisconnected("The client hung up before its answer was ready.")
                self._making.result()
        except SendTimeoutError:
            _log.warning("A client did not read its stream and was cut off", seconds=self.send_timeout)
        finally:
            self._making.cancel()
            await asyncio.wait([self._making], timeout=CLOSE_SECONDS)
            # Unretrieved, the loop would log an error with its message.
            with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
                self._making.exception()

    def _from_first_frame(self, send: Send) -> Send:
        """Return a `send` that holds the start of the response back until there is a frame."""
        start: Message = {}

        async def send_begun(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if not self._begun:
                # A comment, or the end of a response that did not begin.
                if not self._opened or not message["body"]:
                    return
                self._begun = True
                await send({**start, "headers": self.raw_headers})
            await send(message)

        return send_begun

    async def _make(self) -> None:
        """Put frames until the stream is complete, and close what they are made from."""
        try:
            await self._put_all()
        finally:
            self._has_frames.set()

    @abstractmethod
    async def _put_all(self) -> None:
        """Put all frames.  Raises: AppError: there are none."""

    async def _put(self, frames: bytes) -> None:
        """Let frames be sent, and wait while the client is slow."""
        self._opened = True
        self._buffer.append(frames)
        self._has_frames.set()
        while len(self._buffer) >= READ_AHEAD:
            self._has_capacity.clear()
            await self._has_capacity.wait()

    async def _ready_frames(self) -> AsyncIterator[bytes]:
        """Yield frames as they are put; those that are ready at the same moment leave together."""
        while not self._making.done() or self._buffer:
            await self._has_frames.wait()
            self._has_frames.clear()
            ready = b"".join(self._buffer)
            self._buffer.clear()
            self._has_capacity.set()
            if ready:
                yield ready
        if self._begun:
            await self._making


class EventStream(FrameResponse):
    """Streams the events of a generation, and closes the generation however the stream ends."""

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        encoder: StreamEncoder,
        *,
        headers: Callable[[Started], Mapping[str, str]] = lambda started: {},
        on_error: Callable[[AppError], None] = lambda error: None,
        ping_seconds: float = PING_SECONDS,
        send_timeout_seconds: float = SEND_TIMEOUT_SECONDS,
    ) -> None:
        """Args:
        events: Started, and what follows it.
        headers: returns those of the response, beside its own.
        on_error: is called with the error that refuses the generation, or ends it midway.
        """
        super().__init__(ping_seconds=ping_seconds, send_timeout_seconds=send_timeout_seconds)
        self._events = events
        self._on_error = on_error
        self._encoder = encoder
        self._headers_of = headers
        self._finished = False

    async def _put_all(self) -> None:
        try:
            async with aclosing(self._events):
                await self._put_events()
        except Exception as error:  # as_app_error logs what is unexpected
            if isinstance(error, AppError):
                self._on_error(error)
            if not self._opened:
                raise
            shown = as_app_error(error)
            if not self._finished:
                self._buffer.append(self._encoder.encode_error(shown))

    async def _put_events(self) -> None:
        async for event in self._events:
            frames = self._encoder.encode(event)
            if isinstance(event, Started) and not self._opened:
                self.headers.update(self._headers_of(event))
                # A comment at once shows that the stream lives, however long the first token takes.
                frames = _KEEP_ALIVE.encode() + frames
            self._finished = isinstance(event, Finished)
            if frames:
                await self._put(frames)
        if not self._finished:
            raise RuntimeError("a generation ended without its last event")


class FrameStream(FrameResponse):
    """Streams frames that somebody else's work produces; the work goes on when the client hangs up."""

    def __init__(self, frames: AsyncGenerator[bytes, None], *, ping_seconds: float = PING_SECONDS) -> None:
        super().__init__(ping_seconds=ping_seconds)
        self._frames = frames

    async def _put_all(self) -> None:
        await self._put(_KEEP_ALIVE.encode())
        async with aclosing(self._frames):
            async for frames in self._frames:
                await self._put(frames)


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


async def collect_response(request: Request, events: AsyncGenerator[Event, None]) -> Response:
    """Read a generation to its end, unless the client disconnects before.

    Raises: AppError: what ended the generation instead.
    """

    async def read() -> Response:
        async with aclosing(events):
            return await collect(events)

    return await cancel_on_disconnect(request, read())
