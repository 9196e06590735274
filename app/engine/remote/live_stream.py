"""One live request to a server: reads its response in a task of its own, and ends it in exactly one way.

Decides which time limit holds, and what a response that is no stream of OpenAI's is called.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from app.config import DeadlineConfig
from app.engine.remote.chunks import DONE, Chunk, SseLines, UnreadableStreamError, read_chunk
from app.engine.remote.completion import RemoteCompletion
from app.engine.remote.connections import UpstreamResponse
from app.engine.remote.failures import UpstreamError
from app.engine.remote.merging import DeltaMerger
from app.engine.remote.pool import UpstreamPool
from app.engine.remote.upstream import Upstream
from app.engine.remote.wire import request_path
from app.errors import AppError, DeadlineExceeded, EngineFailed
from app.events import Event, Finished, Started
from app.requests import GenerationRequest
from app.types import FinishReason

log = logging.getLogger(__name__)

TAIL_SECONDS = 2.0
"""How long the usage may take after the end of the text; a server that has none may leave the stream open."""
LENIENCY = 0.05
"""How much longer than allowed a server may be silent, as a share of that, for the sake of fewer timers."""

BodyOf = Callable[[Upstream], Mapping[str, Any]]


class _Clock:
    """Moves the time limit of a request from phase to phase; the total one stands above it."""

    def __init__(self, deadlines: DeadlineConfig, idle_seconds: float) -> None:
        self.limit = asyncio.timeout(None)
        self._deadlines = deadlines
        self._idle_seconds = idle_seconds
        self._loop = asyncio.get_running_loop()
        self._last_moment = self._loop.time() + deadlines.total_seconds
        self._moment = 0.0
        """When the time is over, as far as is known."""
        self._follows = False
        self.error: AppError = DeadlineExceeded("The model took too long to its first token.")
        """What it is called when the time is over."""

    def starts(self) -> None:
        """Begin, once the limit has been entered."""
        self._set(self._deadlines.waiting_seconds + self._deadlines.first_token_seconds)

    def heard(self) -> None:
        """Note that bytes have come."""
        # A timer for every token would cost as much as reading it.
        if self._follows and self._loop.time() + self._idle_seconds > self._moment:
            self._set(self._idle_seconds * (1 + LENIENCY))

    def generates(self) -> None:
        """Note that a token has come."""
        if self._follows:
            return
        self._follows = True
        self.error = EngineFailed("The model's server fell silent in the middle of its answer. Try again.")
        self._set(self._idle_seconds)

    def ends(self) -> None:
        """Note that the text is complete."""
        self._follows = False
        self._set(TAIL_SECONDS)

    def _set(self, seconds: float) -> None:
        moment = self._loop.time() + seconds
        if moment >= self._last_moment:
            moment, self.error = self._last_moment, DeadlineExceeded("The answer took too long.")
        self._moment = moment
        self.limit.reschedule(moment)


class LiveStream:
    """A request from when a server is chosen until its one outcome."""

    def __init__(
        self,
        request: GenerationRequest,
        pool: UpstreamPool,
        body: BodyOf,
        *,
        names_stops: bool,
        deadlines: DeadlineConfig,
        idle_seconds: float,
    ) -> None:
        """Begin to send it."""
        self.request = request
        self.started = False
        """Whether a server has taken it."""
        self._pool = pool
        self._body = body
        self._deadlines = deadlines
        self._idle_seconds = idle_seconds
        self._completion = RemoteCompletion(request, names_stops=names_stops)
        self._merger = DeltaMerger(streams=request.stream)
        self._queue: asyncio.Queue[Event | AppError] = asyncio.Queue()
        self._over = False
        self._reported = False
        """Whether the server has ended it with an error in its own words."""
        self._upstream: Upstream | None = None
        self._times = request.progress.times
        self._times.accepted = time.monotonic()
        self._task = asyncio.create_task(self._run())

    async def next(self) -> Event:
        """Return the next event.  Raises: AppError: what ended the request in place of Finished."""
        event = await self._queue.get()
        if isinstance(event, AppError):
            raise event
        return event

    def abort(self) -> None:
        """End it with the text that it has."""
        if not self._over:
            self._begin()
            self._finish(self._completion.end(FinishReason.ABORT))
            self._task.cancel()

    async def close(self) -> None:
        """Hang up if it is not over, and wait until the connection is free."""
        if not self._over:
            self._over = True
            self._times.ended = time.monotonic()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._relay()
        except AppError as error:
            silent = isinstance(error, DeadlineExceeded) and not self.request.progress.generated
            if self._upstream is not None and (silent or isinstance(error, EngineFailed)):
                # What a server says may hold text of this request, which is nobody else's to read.
                self._pool.failed(self._upstream, "it reported an error" if self._reported else error.message)
            self._end(error)
        except Exception as error:  # noqa: BLE001  # it belongs to this request alone
            # Without its message, which could hold the text.
            log.error("a remote completion failed: %s", type(error).__name__)
            self._end(EngineFailed("The answer of the model's server could not be read."))

    async def _relay(self) -> None:
        clock = _Clock(self._deadlines, self._idle_seconds)
        done = False
        try:
            async with clock.limit:
                clock.starts()
                done = await self._follow(clock)
        except TimeoutError:
            if not clock.limit.expired():
                raise
            if not self._completion.has_reason:
                raise clock.error from None
        delta, finished = self._completion.finish(done=done)
        self._merger.add(delta)
        self._finish(finished)
        if self._upstream is not None:
            self._upstream.breaker.succeeded()

    async def _follow(self, clock: _Clock) -> bool:
        """Read the response to its end, and return whether the server said that it is one."""
        path = request_path(self.request)
        async with self._pool.stream(self.request, path, self._body) as (upstream, response):
            self._upstream = upstream
            self._begin()
            try:
                chunks = _Chunks(response)
                while (arrived := await chunks.read()) is not None:
                    clock.heard()
                    if self._take(arrived, clock):
                        break
            except UnreadableStreamError as error:
                raise EngineFailed(f"The model's server sent {error} in place of an answer.") from None
            except UpstreamError as error:
                if self._completion.has_reason:
                    return True
                raise EngineFailed("The connection to the model's server broke in the middle of the answer.") from error
            if chunks.done:
                response.end()
            return chunks.done or self._completion.matched

    def _take(self, chunks: Iterable[Chunk], clock: _Clock) -> bool:
        """Pass on what has arrived together, and return whether nothing more is wanted."""
        try:
            for chunk in chunks:
                if chunk.error is not None:
                    self._reported = True
                    raise self._pool.errors.of_stream(chunk.error)
                delta = self._completion.feed(chunk)
                self._merger.add(delta)
                if self._times.first_token is None and (delta.is_visible or delta.tokens):
                    self._times.first_token = time.monotonic()
                if self._completion.matched:
                    return True
                if self._completion.has_reason:
                    clock.ends()
                elif delta.is_visible or delta.tokens:
                    clock.generates()
        finally:
            if (merged := self._merger.take()) is not None and not self._over:
                self._queue.put_nowait(merged)
        return False

    def _begin(self) -> None:
        if not self.started and not self._over:
            self.started = True
            self._times.began = time.monotonic()
            self._queue.put_nowait(Started(prompt_tokens=self.request.prompt_tokens))

    def _finish(self, finished: Finished) -> None:
        if not self._over and (held := self._merger.finish()) is not None:
            self._queue.put_nowait(held)
        self._end(finished)

    def _end(self, outcome: Finished | AppError) -> None:
        if not self._over:
            self._over = True
            self._times.ended = time.monotonic()
            self._queue.put_nowait(outcome)


class _Chunks:
    """The objects of one response, whether it is a stream or, from a server that does not stream, a whole one."""

    def __init__(self, response: UpstreamResponse) -> None:
        """Raises: UnreadableStreamError: it is something else."""
        self._response = response
        self._lines = SseLines()
        self.done = False
        """Whether the server said that nothing more comes."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._is_whole = kind == "application/json"
        if kind not in ("", "application/json", "text/event-stream"):
            raise UnreadableStreamError(f"{kind if kind.replace('/', '').isalpha() else 'something'}")

    async def read(self) -> Iterable[Chunk] | None:
        """Return the objects that arrive together, none for a comment that keeps the connection open; None at the end.

        Raises: UnreadableStreamError: they are something else, also while they are taken.  UpstreamError.
        """
        if self.done:
            return None
        if self._is_whole:
            chunk = read_chunk(await self._response.body())
            self.done = True
            return [chunk]
        if part := await self._response.read():
            return self._objects(self._lines.feed(part))
        rest = self._lines.finish()
        return self._objects([rest]) if rest else None

    def _objects(self, lines: Iterable[bytes]) -> Iterator[Chunk]:
        for data in lines:
            if data == DONE:
                self.done = True
                return
            yield read_chunk(data)
