"""Decide how an answer travels: as server-sent events, or whole unless the client has gone.

An answer that nobody reads any more is cancelled at once, either way.  Knows connections and frames, but no
field of an answer.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import anyio
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.errors import AppError, ClientDisconnected
from app.generation.requests import Event, Finished, Reply, Started, collect
from app.web.http.errors import as_app_error

PING_SECONDS = 15.0
"""Below the idle timeouts of the common proxies, which start at 30 s."""
SEND_TIMEOUT_SECONDS = 15.0
"""How long a client may leave its receive buffer full before it loses its place."""
CLOSE_SECONDS = 5.0
"""An answer is cancelled within one token; this bounds the wait if the engine hangs."""
READ_AHEAD = 16
"""Events made before the client took the earlier ones; then the answer waits for it."""

_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")


class Dialect(Protocol):
    """How a stream is written: the bytes of each event, and of what went wrong."""

    def frames(self, event: Event) -> bytes:
        """Return an event's frames; empty for an event that has none."""

    def failure(self, error: AppError) -> bytes:
        """Return what ends a stream that failed midway."""


_T = TypeVar("_T")
_log = structlog.get_logger("llm_service")


class EventStream(EventSourceResponse):
    """An answer as it is made; closes it however the stream ends.

    The answer is read in a task of its own.  The library ends a stream by cancelling a task group, which cuts off every
    `await` of a cleanup, again and again; a task of its own is cancelled once and can free what the answer holds.
    """

    def __init__(
        self,
        started: Started,
        events: AsyncGenerator[Event, None],
        dialect: Dialect,
        *,
        headers: Mapping[str, str] | None = None,
        ping_seconds: float = PING_SECONDS,
        send_timeout_seconds: float = SEND_TIMEOUT_SECONDS,
    ) -> None:
        """Args:
        started: the answer's first event.
        events: those that follow.
        """
        self._started = started
        self._events = events
        self._dialect = dialect
        self._reading: asyncio.Task[None]
        self._inlet, self._outlet = anyio.create_memory_object_stream[Event](READ_AHEAD)
        super().__init__(
            self._frames(),
            headers={"Cache-Control": "no-cache", **(headers or {})},
            ping=ping_seconds,
            ping_message_factory=lambda: _KEEP_ALIVE,
            send_timeout=send_timeout_seconds,
            sep="\n",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._reading = asyncio.create_task(self._read())
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.warning("A client did not read its stream and was cut off", seconds=self.send_timeout)
        finally:
            await self._close()

    async def _read(self) -> None:
        with self._inlet:
            async for event in self._events:
                await self._inlet.send(event)

    async def _frames(self) -> AsyncIterator[bytes]:
        # A comment at once tells proxies and clients that the stream lives, however long the first token takes.
        yield _KEEP_ALIVE.encode()
        finished = False
        try:
            if opening := self._dialect.frames(self._started):
                yield opening
            async for event in self._outlet:
                finished = isinstance(event, Finished)
                if frames := self._dialect.frames(event):
                    yield frames
            await self._reading
            if not finished:
                raise RuntimeError("an answer ended without its last event")
        except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
            shown = as_app_error(error)
            if not finished:
                yield self._dialect.failure(shown)

    async def _close(self) -> None:
        self._reading.cancel()
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await asyncio.wait({self._reading})
            # Not begun or not ended: the reader went while it waited to be read itself.
            await self._events.aclose()
        self._inlet.close()
        self._outlet.close()
        # Whoever still read has had the error; unseen, the loop would log it with its message.
        with suppress(asyncio.CancelledError, asyncio.InvalidStateError):
            self._reading.exception()

    @staticmethod
    async def _listen_for_exit_signal() -> None:
        # The library polls for a shutdown twice a second and then cuts every stream.  Draining is the service's: it
        # lets answers finish, and ends those that do not with a last event.
        await anyio.sleep_forever()


def frame(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one server-sent event."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


async def answer_unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Do the work, but cancel it as soon as the client hangs up.

    The body must have been read before: what `receive` still brings is the hang-up.

    Raises: ClientDisconnected: nobody waits for the answer.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected("The client hung up before its answer was ready.")
        return working.result()
    finally:
        # A finished task is left alone: awaiting it again would cut the traceback of its error.
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def begin(request: Request, events: AsyncGenerator[Event, None]) -> Started:
    """Wait until an answer has begun, so that what is wrong with the request is still an ordinary error.

    Raises: AppError: the request is wrong or cannot be taken.
    """

    async def first() -> Started:
        event = await anext(events)
        if not isinstance(event, Started):
            raise TypeError("an answer begins with Started")
        return event

    return await answer_unless_gone(request, first())


async def whole(request: Request, events: AsyncGenerator[Event, None]) -> Reply:
    """Read an answer to its end, unless the client hangs up before.

    Raises: AppError: whatever ended the answer instead.
    """

    async def read() -> Reply:
        async with aclosing(events):
            return await collect(events)

    return await answer_unless_gone(request, read())
