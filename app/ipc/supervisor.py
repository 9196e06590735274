"""Keep one worker running: start it, watch it, start it again when it dies.

Decides the engine's state, the back-off, and when a silent worker counts as hung.  Knows no text and no sockets: it
is told the numbers of the requests that the worker owes an end, and passes on what the worker says.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, Protocol

from app.errors import EngineFailed
from app.ipc.messages import (
    Cancel,
    FromWorker,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    Step,
    Submit,
    TokenEvent,
)
from app.ipc.worker_process import WorkerLink, WorkerLostError
from app.types import EngineState

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A worker that served this long starts the back-off anew."""
SHUTDOWN_SECONDS = 5.0
"""How long a worker may take to leave before it is killed."""

Launch = Callable[[], Awaitable[WorkerLink]]


class Listener(Protocol):
    """Who is told what the worker does."""

    async def on_ready(self, ready: Ready) -> None:
        """The model is loaded.  Raises: WorkerLostError: it cannot be used; the worker is ended."""

    def on_event(self, event: TokenEvent) -> None:
        """Something happened to a request."""

    def on_lost(self) -> None:
        """The worker is gone, and every request on it."""

    def on_close(self) -> None:
        """The engine is closing; every request ends now."""


class Supervisor:
    """The life of a worker, and of those that follow it."""

    def __init__(self, launch: Launch, listener: Listener, *, hang_seconds: float, backoff_seconds: float) -> None:
        self.state = EngineState.LOADING
        self.error: str | None = None
        """Why the last worker ended; None while one serves."""
        self.stage = "process"
        """How far the load has come."""
        self.restarts = 0
        self._launch = launch
        self._listener = listener
        self._hang_seconds = hang_seconds
        self._backoff_seconds = backoff_seconds
        self._decided = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._link: WorkerLink | None = None
        self._owed: set[int] = set()
        self._progress_at = 0.0
        self._ready_at: float | None = None

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, also while it loads."""
        return self._link.pid if self._link is not None else None

    def start(self) -> None:
        """Begin; nothing happens when it has begun before."""
        if self._running is None and self._closing is None:
            self._running = asyncio.create_task(self._keep_running(), name="model worker")

    async def wait_ready(self) -> None:
        """Return when the model is loaded.

        Raises: EngineFailed: it cannot be, or the engine is closed.
        """
        while self.state is not EngineState.READY:
            if self.state in (EngineState.FAILED, EngineState.CLOSED):
                raise EngineFailed(self.error or "The engine is closed.")
            self._decided.clear()
            await self._decided.wait()

    def submit(self, request: Submit) -> None:
        """Give the worker a request; it owes an event with an end for it.  Only while READY."""
        if not self._owed:
            self._progress_at = _now()
        self._owed.add(request.id)
        self._send(request)

    def cancel(self, number: int) -> None:
        """Stop the worker on a request, if it has not ended it itself."""
        if number in self._owed:
            self._send(Cancel(number))

    async def close(self) -> None:
        """End the worker for good; every further call waits for the same end."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._shut_down(), name="model shutdown")
        await asyncio.shield(self._closing)

    def _send(self, message: Submit | Cancel | Shutdown) -> None:
        if self._link is not None:
            self._link.send(message)

    async def _keep_running(self) -> None:
        delay_seconds = self._backoff_seconds
        loaded_once = False
        while True:
            reason = await self._run_once()
            if self.state is EngineState.CLOSED:
                return
            loaded_once = loaded_once or self._ready_at is not None
            if not loaded_once:
                log.error("%s", reason)
                self._decide(EngineState.FAILED)
                return
            if self._ready_at is not None and _now() - self._ready_at > HEALTHY_SECONDS:
                delay_seconds = self._backoff_seconds
            self._ready_at = None
            log.warning("%s Starting it again in %g s.", reason, delay_seconds)
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, MAX_BACKOFF_SECONDS)
            self.restarts += 1

    async def _run_once(self) -> str:
        """Run one worker to its end and return why it ended; its requests have been told by then."""
        try:
            link = self._link = await self._launch()
        except OSError as error:
            return self._lose(f"The model's worker could not be started ({error.strerror}).")
        watchdog = asyncio.create_task(self._watch(link), name="model watchdog")
        try:
            await self._listen(link)
        except WorkerLostError as loss:
            return self._lose(watchdog.result() if watchdog.done() else str(loss))
        except Exception:
            log.exception("the model's worker could not be served")
            return self._lose("The model's worker could not be served; the log says why.")
        finally:
            self._link = None
            watchdog.cancel()
            await link.stop(0)

    async def _watch(self, link: WorkerLink) -> str:
        """Kill the worker when it has work and makes no progress, and return that reason."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_seconds / 4))
            if self._owed and _now() - self._progress_at > self._hang_seconds:
                link.kill()
                return f"The model's worker made no progress for {self._hang_seconds:g} s and was ended."

    async def _listen(self, link: WorkerLink) -> NoReturn:
        """Pass on what the worker says until it is lost, which is raised."""
        while True:
            for message in await link.receive():
                await self._take_in(message)

    async def _take_in(self, message: FromWorker) -> None:
        self._progress_at = _now()
        match message:
            case Step(events=events):
                for event in events:
                    if event.finish is not None or event.error is not None:
                        self._owed.discard(event.id)
                    self._listener.on_event(event)
            case Loading(stage=stage):
                self.stage = stage
            case LoadFailed(message=reason):
                raise WorkerLostError(reason)
            case Ready():
                await self._listener.on_ready(message)
                self._ready_at = _now()
                self.error = None
                self._decide(EngineState.READY)

    def _lose(self, reason: str) -> str:
        self._link = None
        self._owed.clear()
        self.error = reason
        if self.state is EngineState.READY:
            self._decide(EngineState.RESTARTING)
        self._listener.on_lost()
        return reason

    def _decide(self, state: EngineState) -> None:
        if self.state is not EngineState.CLOSED:
            self.state = state
            self._decided.set()

    async def _shut_down(self) -> None:
        grace_seconds = SHUTDOWN_SECONDS if self.state is EngineState.READY else 0.0
        self._decide(EngineState.CLOSED)
        self._listener.on_close()
        if self._running is None:
            return
        if grace_seconds:
            self._send(Shutdown())
            await asyncio.wait([self._running], timeout=grace_seconds)
        self._running.cancel()
        await asyncio.wait([self._running])


def _now() -> float:
    return asyncio.get_running_loop().time()
