"""Supervise one worker process: start it, watch it, restart it when it dies.

Decides the engine's state, the back-off, when a silent worker is taken out of service and when it is killed.  It tracks
the ids of the requests in flight and forwards the worker's messages to a listener.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Protocol

from app.errors import AppError, EngineFailed
from app.ipc.liveness import HEARTBEAT_SECONDS, Liveness
from app.ipc.messages import (
    AdapterFailed,
    AdapterLoaded,
    Cancel,
    Embed,
    Embedded,
    FromWorker,
    LoadAdapter,
    LoadFailed,
    Loading,
    Logged,
    Ready,
    Shutdown,
    Step,
    Submit,
    TokenEvent,
    ToWorker,
    UnloadAdapter,
)
from app.ipc.worker_process import WorkerLink, WorkerLostError
from app.types import EngineState

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 10.0
"""A worker that served this long resets the back-off."""
UNRESPONSIVE_SECONDS = 3 * HEARTBEAT_SECONDS
"""A worker without a sign of life for so long gets no requests until there is one again."""
WATCH_SECONDS = 0.5
"""How often the worker is looked at."""
SHUTDOWN_SECONDS = 5.0
"""How long a worker may take to exit before it is killed."""

Launch = Callable[[], Awaitable[WorkerLink]]


class Listener(Protocol):
    """Receives the worker's messages and the changes of its state."""

    async def on_ready(self, ready: Ready) -> None:
        """The model is loaded.  Raises: WorkerLostError: it cannot be used; the worker is killed."""

    def on_event(self, event: TokenEvent) -> None:
        """A request has made progress or ended."""

    def on_steps(self, seconds: Sequence[float], preempted: int) -> None:
        """The model has made steps, of which each took so long."""

    def on_embedded(self, embedded: Embedded) -> None:
        """Some texts of a request have been embedded."""

    def on_adapter(self, answer: AdapterLoaded | AdapterFailed) -> None:
        """An adapter has been loaded, or cannot be."""

    def on_unresponsive(self) -> None:
        """The worker gives no sign of life; whoever waits for it should not any longer."""

    def on_lost(self) -> None:
        """The worker has exited, and every request on it is lost."""

    def on_close(self) -> None:
        """The engine is closing; every request ends now."""


class Supervisor:
    """Runs a worker process, and the ones that replace it."""

    def __init__(
        self,
        launch: Launch,
        listener: Listener,
        *,
        hang_seconds: float,
        stall_seconds: float,
        backoff_seconds: float,
    ) -> None:
        """Args:
        launch: starts a worker.
        listener: receives what it says.
        hang_seconds: a worker without a sign of life is killed after so long.
        stall_seconds: one that lives, has work and makes no progress is killed after so long.
        backoff_seconds: before the second restart in a row; doubles with each further one.
        """
        self.state = EngineState.LOADING
        self.error: str | None = None
        """Why the last worker ended; None while one serves."""
        self.failure: LoadFailed | None = None
        """Why the model cannot be loaded, where the worker says so."""
        self.progress = Loading("process")
        """How far the load has come."""
        self.restarts = 0
        self._launch = launch
        self._listener = listener
        self._hang_seconds = hang_seconds
        self._stall_seconds = stall_seconds
        self._backoff_seconds = backoff_seconds
        self._state_changed = asyncio.Event()
        self._run_task: asyncio.Task[None] | None = None
        self._close_task: asyncio.Task[None] | None = None
        self._worker: WorkerLink | None = None
        self._in_flight: set[int] = set()
        self._ready_at: float | None = None
        self._lost_at: float | None = None

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, also while it loads."""
        return self._worker.pid if self._worker is not None else None

    def start(self) -> None:
        """Start the worker; further calls do nothing."""
        if self._run_task is None and self._close_task is None:
            self._run_task = asyncio.create_task(self._restart_loop(), name="model worker")

    async def wait_ready(self) -> None:
        """Wait until the model is loaded.

        Raises: EngineFailed: it cannot be, or the engine is closed.
        """
        while self.state is not EngineState.READY:
            if self.state in (EngineState.FAILED, EngineState.CLOSED):
                raise EngineFailed(self.error or "The engine is closed.", details=self._failure_details())
            self._state_changed.clear()
            await self._state_changed.wait()

    def _failure_details(self) -> dict[str, Any]:
        failure = self.failure
        if failure is None or self.state is not EngineState.FAILED:
            return {}
        details = {"reason": failure.reason, "needed_bytes": failure.needed_bytes, "free_bytes": failure.free_bytes}
        return {name: value for name, value in details.items() if value is not None}

    def submit(self, request: Submit | Embed) -> None:
        """Send the worker a request; it is in flight until an event ends it.  Only while READY.

        Raises: UnicodeEncodeError: a text of it is not valid Unicode.
        """
        self._send(request)
        self._in_flight.add(request.id)

    def send(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Send a message that begins no request; it is lost where no worker runs."""
        self._send(message)

    def cancel(self, request_id: int) -> None:
        """Cancel a request that is in flight; others are ignored."""
        if request_id in self._in_flight:
            self._send(Cancel(request_id))

    def show_progress(self, stage: str, bytes_done: int | None = None, bytes_total: int | None = None) -> None:
        """Say how far a start has come before there is a worker."""
        self.progress = Loading(stage, bytes_done, bytes_total)

    async def close(self) -> None:
        """Stop the worker for good; further calls wait for the same shutdown."""
        if self._close_task is None:
            self._close_task = asyncio.create_task(self._shut_down(), name="model shutdown")
        await asyncio.shield(self._close_task)

    def _send(self, message: ToWorker) -> None:
        if self._worker is not None:
            self._worker.send(message)

    async def _restart_loop(self) -> None:
        # A worker that loaded and then died is replaced at once; only one that keeps dying has to wait.
        delay_seconds = 0.0
        loaded_once = False
        while True:
            reason = await self._run_once()
            if self.state is EngineState.CLOSED:
                return
            loaded_once = loaded_once or self._ready_at is not None
            if not loaded_once:
                log.error("%s", reason)
                self._set_state(EngineState.FAILED)
                return
            if self._ready_at is not None and _now() - self._ready_at > HEALTHY_SECONDS:
                delay_seconds = 0.0
            self._ready_at = None
            log.warning("%s It is started again %s.", reason, f"in {delay_seconds:g} s" if delay_seconds else "now")
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds or self._backoff_seconds, MAX_BACKOFF_SECONDS)
            self.restarts += 1

    async def _run_once(self) -> str:
        """Run one worker until it exits and return why it did; its requests have ended by then."""
        try:
            worker = self._worker = await self._launch()
        except OSError as error:
            return self._on_lost(f"The model's worker could not be started ({error.strerror}).")
        except AppError as error:
            # Its files could not be fetched.
            self.failure = LoadFailed(error.message, error.details.get("reason", "failed"))
            return self._on_lost(error.message)
        except Exception:
            log.exception("the model's worker could not be started")
            return self._on_lost("The model's worker could not be started; the log says why.")
        watchdog = asyncio.create_task(self._watch(worker), name="model watchdog")
        try:
            await self._forward_messages(worker)
        except WorkerLostError as loss:
            return self._on_lost(watchdog.result() if watchdog.done() else str(loss))
        except Exception:
            log.exception("the model's worker could not be served")
            return self._on_lost("The model's worker could not be served; the log says why.")
        finally:
            self._worker = None
            watchdog.cancel()
            await worker.stop(0)

    async def _watch(self, worker: WorkerLink) -> str:
        """Look at the worker until it has to be killed, do that, and return the reason."""
        liveness = Liveness()
        interval = min(WATCH_SECONDS, self._hang_seconds / 4, self._stall_seconds / 4)
        last = _now()
        while True:
            await asyncio.sleep(interval)
            last, elapsed = _now(), _now() - last
            # More has passed only where this process did not run, and so could not hear the worker either.
            liveness.observe(worker.pulse(), busy=bool(self._in_flight), seconds=min(elapsed, 2 * interval))
            if reason := self._judge(liveness):
                worker.kill()
                return reason

    def _judge(self, liveness: Liveness) -> str | None:
        """Take the worker out of service while it gives no sign of life; return why it has to be killed."""
        silent_seconds = liveness.silent_seconds
        loading = self._ready_at is None
        # A process that loads may wait for a disk that is slow, which does not show.
        if silent_seconds > (max(self._hang_seconds, self._stall_seconds) if loading else self._hang_seconds):
            return f"The model's worker gave no sign of life for {silent_seconds:.3g} s and was killed."
        if liveness.stalled_seconds > self._stall_seconds:
            return f"The model's worker made no progress for {liveness.stalled_seconds:.3g} s and was killed."
        if self.state is EngineState.READY and silent_seconds > min(UNRESPONSIVE_SECONDS, self._hang_seconds / 2):
            self.error = "The model's worker gives no sign of life."
            log.warning("%s It gets no requests until it does.", self.error)
            self._set_state(EngineState.UNRESPONSIVE)
            self._listener.on_unresponsive()
        elif self.state is EngineState.UNRESPONSIVE and not silent_seconds:
            self.error = None
            log.warning("The model's worker lives and serves again.")
            self._set_state(EngineState.READY)
        return None

    async def _forward_messages(self, worker: WorkerLink) -> NoReturn:
        """Handle the worker's messages.  Raises: WorkerLostError: there will be no more."""
        while True:
            for message in await worker.receive():
                await self._handle(message)

    async def _handle(self, message: FromWorker) -> None:
        match message:
            case Step(events=events):
                self._listener.on_steps(message.seconds, message.preempted)
                for event in events:
                    if event.finish is not None or event.error is not None:
                        self._in_flight.discard(event.id)
                    self._listener.on_event(event)
            case Embedded():
                self._listener.on_embedded(message)
            case AdapterLoaded() | AdapterFailed():
                self._listener.on_adapter(message)
            case Loading():
                self.progress = message
            case Logged(level=level, line=line):
                log.log(level, "%s", line)
            case LoadFailed(message=reason):
                self.failure = message
                raise WorkerLostError(reason)
            case Ready():
                await self._listener.on_ready(message)
                self._ready_at = _now()
                self.error = None
                if self._lost_at is not None:
                    log.warning("The model's worker was replaced within %.1f s.", self._ready_at - self._lost_at)
                    self._lost_at = None
                self._set_state(EngineState.READY)

    def _on_lost(self, reason: str) -> str:
        self._worker = None
        self._in_flight.clear()
        self.error = reason
        if self.state in (EngineState.READY, EngineState.UNRESPONSIVE):
            self._lost_at = _now()
            self._set_state(EngineState.RESTARTING)
        self._listener.on_lost()
        return reason

    def _set_state(self, state: EngineState) -> None:
        if self.state is not EngineState.CLOSED:
            self.state = state
            self._state_changed.set()

    async def _shut_down(self) -> None:
        grace_seconds = SHUTDOWN_SECONDS if self.state is EngineState.READY else 0.0
        self._set_state(EngineState.CLOSED)
        self._listener.on_close()
        if self._run_task is None:
            return
        if grace_seconds:
            self._send(Shutdown())
            await asyncio.wait([self._run_task], timeout=grace_seconds)
        self._run_task.cancel()
        await asyncio.wait([self._run_task])


def _now() -> float:
    return asyncio.get_running_loop().time()
