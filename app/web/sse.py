"""Decide how an answer travels: as server-sent events, or whole unless the client has gone.

An answer that nobody reads any more is cancelled at once, either way.  Knows connections and frames, but no
field of an answer.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import anyio
import structlog
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from app.errors import ClientDisconnected
from app.generation.asks import Event, Finished, Reply, collect
from app.web.errors import as_app_error, envelope

Frame = tuple[str, Mapping[str, Any]]
"""An event's name and its data."""

PING_SECONDS = 15.0
"""Below the idle timeouts of the common proxies, which start at 30 s."""
SEND_TIMEOUT_SECONDS = 15.0
"""How long a client may leave its receive buffer full before it loses its place."""
CLOSE_SECONDS = 5.0
"""An answer is cancelled within one token; this bounds the wait if the engine hangs."""
READ_AHEAD = 16
"""Events made before the client took the earlier ones; then the answer waits for it."""

_KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")

_T = TypeVar("_T")
_log = structlog.get_logger("llm_service")


class EventStream(EventSourceResponse):
    """An answer as it is made; closes it however the stream ends.

    The answer is read in a task of its own.  The library ends a stream by cancelling a task group, which cuts off every
    `await` of a cleanup, again and again; a task of its own is cancelled once and can free what the answer holds.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        encode: Callable[[Event], Frame | None],
        request_id: str,
        *,
        ping_seconds: float = PING_SECONDS,
        send_timeout_seconds: float = SEND_TIMEOUT_SECONDS,
    ) -> None:
        """Args:
        events: an answer that has begun.
        encode: returns an event's frame, or None for an event that has none.
        request_id: stands in the envelope should the answer fail midway.
        """
        self._events = events
        self._encode = encode
        self._request_id = request_id
        self._reading: asyncio.Task[None]
        self._inlet, self._outlet = anyio.create_memory_object_stream[Event](READ_AHEAD)
        super().__init__(
            self._frames(),
            headers={"Cache-Control": "no-cache"},
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
            async for event in self._outlet:
                finished = isinstance(event, Finished)
                if encoded := self._encode(event):
                    yield _frame(*encoded)
            await self._reading
            if not finished:
                raise RuntimeError("an answer ended without its last event")
        except Exception as error:  # noqa: BLE001  # as_app_error logs what is unexpected
            shown = as_app_error(error)
            if not finished:
                yield _frame("error", envelope(shown, self._request_id))

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


def _frame(name: str, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode()


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


async def begin(request: Request, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """Wait until an answer has begun, so that what is wrong with the request is still an ordinary error.

    Raises: AppError: the request is wrong or cannot be taken.
    """

    async def first() -> None:
        await anext(events)

    await answer_unless_gone(request, first())
    return events


async def whole(request: Request, events: AsyncGenerator[Event, None]) -> Reply:
    """Read an answer to its end, unless the client hangs up before.

    Raises: AppError: whatever ended the answer instead.
    """

    async def read() -> Reply:
        async with aclosing(events):
            return await collect(events)

    return await answer_unless_gone(request, read())
