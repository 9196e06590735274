"""Runs an engine on an event loop of its own, in a background thread, for programs that have no loop or another one.

Calls may come from any loop and any thread.  The engine closes with the object that stands for it here: by `close`,
when nobody holds the object any more, and at the end of the process.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import thread as _executors  # noqa: F401  # see the end of this module
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from app.engine.base import PreparedPrompt
from app.events import Event
from app.requests import GenerationRequest

T = TypeVar("T")

CLOSE_SECONDS = 30.0
"""Longest wait for an engine to close."""
CLOSED = "this model is closed; create it again to go on"


class Generator(Protocol):
    """The part of `Engine` that LangChain's classes need."""

    async def start(self) -> None:
        """Begin to load the model."""

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.  Raises: AppError: they never can."""

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Encode the prompt of a request."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate; closing the generator early cancels the request."""

    async def close(self) -> None:
        """Stop for good."""


class EngineThread:
    """The thread, its event loop, and the engine on it."""

    def __init__(self, engine: Generator, name: str) -> None:
        self.engine = engine
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._ready: Future[None] = Future()
        self._closing: asyncio.Event | None = None
        # A thread that is no daemon would keep the process from ending; `_close_all` waits for this one instead.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop.result()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Load the model and return once it can be used.

        Raises: AppError: it cannot be loaded, or no service answers.
        """
        self._thread.start()
        _threads.add(self)
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise

    def stop(self) -> None:
        """Begin to close the engine, and return at once."""
        with suppress(RuntimeError):  # the loop is closed already
            self.loop.call_soon_threadsafe(self._stop)

    def close(self) -> None:
        """Close the engine and wait for that, except on its own thread."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the engine's loop, in the order of such calls, and return at once.

        Raises: RuntimeError: the model is closed.
        """
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:
            raise RuntimeError(CLOSED) from None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the engine's loop.

        Raises: RuntimeError: the model is closed.
        """
        try:
            if self.is_running:
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # it was closed just now
            pass
        work.close()
        raise RuntimeError(CLOSED)

    def _stop(self) -> None:
        if self._closing is not None:
            self._closing.set()

    def _run(self) -> None:
        reason: BaseException = RuntimeError(CLOSED)
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  # raised where the model is created
            reason = error
        # Whoever waits for a model that was closed while it was loaded would wait for ever.
        for each in (self._loop, self._ready):
            if not each.done():
                each.set_exception(reason)

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        self._loop.set_result(asyncio.get_running_loop())
        try:
            loading = asyncio.ensure_future(self._load())
            closing = asyncio.ensure_future(self._closing.wait())
            await asyncio.wait([loading, closing], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._ready.set_result(None)
            else:
                loading.cancel()
            await closing
        finally:
            await self.engine.close()

    async def _load(self) -> None:
        await self.engine.start()
        await self.engine.wait_ready()


class ThreadedEngine:
    """An engine behind its thread; usable from every loop, the engine's own included."""

    def __init__(self, engine: Generator, name: str) -> None:
        """Load the model, or find the service; returns once it can be used.

        Raises: AppError: it cannot be loaded, or no service answers.
        """
        self._thread = EngineThread(engine, name)
        self._thread.start()
        # The thread holds the engine but never this object, or it would never be garbage.
        weakref.finalize(self, self._thread.stop).atexit = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._thread.loop

    @property
    def engine(self) -> Any:
        """Return the engine itself, which only its own loop may use."""
        return self._thread.engine

    def close(self) -> None:
        """Close the engine and wait for that; a second call does nothing."""
        self._thread.close()

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        return await self._there(self._thread.engine.prepare(request))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate on the engine's loop; closing this closes the engine's stream before it returns."""
        if _is_running(self.loop):
            async with aclosing(self._thread.engine.stream(request)) as events:
                async for event in events:
                    yield event
            return
        here, queue = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException | None]()

        def hand_over(item: Event | BaseException | None) -> None:
            with suppress(RuntimeError):  # the reader's loop has ended
                here.call_soon_threadsafe(queue.put_nowait, item)

        engine, tasks = self._thread.engine, list[asyncio.Task[None]]()
        # Without waiting for it: whoever is cancelled meanwhile would leave it running.
        self._thread.call(lambda: tasks.append(asyncio.ensure_future(_pump(engine, request, hand_over))))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, asyncio.CancelledError):
                    raise RuntimeError(CLOSED)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            with suppress(RuntimeError):  # closed meanwhile, which has ended the stream too
                self._thread.call(lambda: tasks[0].cancel())
                await self._there(_ended(tasks))

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine that runs on the engine's loop."""
        if _is_running(self.loop):
            return await work
        future = self._thread.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # nobody cancelled this side
                raise RuntimeError(CLOSED) from None
            raise


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    return asyncio.get_running_loop() is loop


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)


async def _pump(engine: Generator, request: GenerationRequest, hand_over: Any) -> None:
    """Read a stream of the engine to its end, or to its error, which is the last item that is handed over."""
    try:
        async with aclosing(engine.stream(request)) as events:
            async for event in events:
                hand_over(event)
    except asyncio.CancelledError as error:
        hand_over(error)
        raise
    except Exception as error:  # noqa: BLE001  # raised where the stream is read
        hand_over(error)
    else:
        hand_over(None)


_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


def _close_all() -> None:
    """Close what is open when the process ends, while threads can still be started, which closing may need to."""
    running = [each for each in _threads if each.is_running]
    for each in running:
        each.stop()
    for each in running:
        each.close()


# An ordinary atexit function comes after the executors of all event loops have been shut down.  Of these the one that
# was registered last is called first, so the executors' own module has to be imported before, as it is above.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
