"""Serves the application on a socket until a signal: binds, prints how to use it, drains, and returns an exit code.

It and `web/http/protocol.py` alone import uvicorn; `cli/root.py` calls `run`.
"""

import asyncio
import errno
import gc
import math
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from app.access.bootstrap_key import KEY_FILE, bootstrap_key
from app.access.page_link import VALID_SECONDS, new_code
from app.config import Settings
from app.config.variables import unread_variables
from app.engine.base import LoadProgress
from app.errors import AppError, ConfigError, ModelNotFound
from app.ipc.api_processes import ApiProcesses
from app.loading_display import show_loading
from app.main import create_app, require_shared_state
from app.telemetry import configure_logging
from app.web.http.connections import ConnectionGuard, ConnectionLimits, raise_file_limit
from app.web.http.dependencies import Container
from app.web.http.protocol import ServerConfig

log = structlog.get_logger(__name__)

_FLUSH_SECONDS = 5.0
"""How long last events may take to reach their clients once draining is over."""
_FORCED_FLUSH_SECONDS = 2.0
"""The same for a forced stop; a model step that is running when it begins must end within it."""
YOUNG_OBJECTS = 20_000
"""So many more objects than before begin a round of garbage collection, of some 10 ms.  Python's 700 are fewer than two
requests have, whose objects are freed without one: a burst of 32 took a tenth of its time in 14 rounds."""
_REPEAT_SECONDS = 1.0
"""Signals that follow one sooner count as the same one: a terminal and a parent process may both send it."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that lets running requests finish before it closes its sockets.

    The first signal begins the grace period, the second cuts it short, and the third kills the process.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[float], Awaitable[None]], grace_seconds: float) -> None:
        """
        Args:
            drain: refuses new work and returns when running work has finished, or was aborted after so many seconds.
            grace_seconds: how long running work may take after the first signal.
        """
        super().__init__(config)
        self._drain = drain
        self._grace_seconds = grace_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self.listening = asyncio.Event()
        """Set once connections are accepted."""
        self._signals = 0
        self._last_signal = -math.inf
        self._stopping: list[asyncio.Task[None]] = []

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.should_exit or self._signals > 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._loop is None or now - self._last_signal < _REPEAT_SECONDS:
            return
        self._last_signal = now
        self._signals += 1
        if self._signals > 2:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        # A signal interrupts the loop anywhere, so the work itself waits for the loop's next turn.
        self._loop.call_soon_threadsafe(self._begin_stop, signal.Signals(sig).name, self._signals == 2)

    def end(self, sentinel: int) -> None:
        """Stop as after a signal: the process that started this one is gone.  Args: sentinel: says so, and is read."""
        asyncio.get_running_loop().remove_reader(sentinel)
        self._signals += 1
        self._begin_stop("parent gone", False)

    def _begin_stop(self, reason: str, forced: bool) -> None:
        log.info("stopping now" if forced else "draining", signal=reason)
        grace, flush = (0.0, _FORCED_FLUSH_SECONDS) if forced else (self._grace_seconds, _FLUSH_SECONDS)
        # uvicorn waits so long for connections to close, and must not wait longer than this stop does.
        self.config.timeout_graceful_shutdown = math.ceil(flush)
        self._stopping.append(asyncio.create_task(self._stop(grace, flush)))

    async def _stop(self, grace_seconds: float, flush_seconds: float) -> None:
        try:
            await self._drain(grace_seconds)
            await self._finish_requests(flush_seconds)
        finally:
            self.should_exit = True

    async def _finish_requests(self, flush_seconds: float) -> None:
        """Let last events reach their clients, and disconnect the clients that do not read them.

        uvicorn would cancel these requests and log a traceback for each; one whose client has gone ends by itself and
        leaves its row in the inference log.
        """
        if not (tasks := set(self.server_state.tasks)):
            return
        _, unfinished = await asyncio.wait(tasks, timeout=flush_seconds)
        if unfinished:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await asyncio.wait(unfinished, timeout=flush_seconds)


def run(settings: Settings) -> int:
    """Serve until a signal, in this process or in as many as configured; return the exit code.

    Raises: ConfigError: the port is taken, or a file that the service needs is missing.
    """
    listener = _bind(settings.app.host, settings.app.port)
    stop_logging = configure_logging(settings.logging)
    try:
        warn_of_variables()
        warn_of_workers(settings)
        if settings.workers == 1:
            return _serve_here(settings, listener)
        require_shared_state(settings)
        with _announced_key(settings):
            if settings.security.api_key is None:
                bootstrap_key(settings.app.data_dir)
        return ApiProcesses(partial(_start_process, settings, listener), settings.workers).run()
    finally:
        stop_logging()
        listener.close()


def _serve_here(settings: Settings, listener: socket.socket, *, number: int = 0) -> int:
    """Serve in this process.  Args: number: only 0 tells the terminal how to use the service."""
    with _announced_key(settings):
        app = create_app(settings)
    config = server_config(app, settings, timeout_graceful_shutdown=math.ceil(_FLUSH_SECONDS))
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(app, settings, config, listener, number=number))


@contextmanager
def _announced_key(settings: Settings) -> Iterator[None]:
    """Print the first key, if the block makes it."""
    key_file = settings.app.data_dir / KEY_FILE
    first_start = settings.security.api_key is None and not key_file.exists()
    yield
    if first_start:
        print(f"\nYour API key, made now and kept in {key_file.resolve()}:\n\n  {key_file.read_text()}", flush=True)


def _start_process(settings: Settings, listener: socket.socket, number: int) -> SpawnProcess:
    """Start one of several processes that accept connections of one socket."""
    # Only what was set: models among several take what they do not say from elsewhere.
    given = settings.model_dump(exclude_unset=True)
    process = multiprocessing.get_context("spawn").Process(target=_run_process, args=(given, listener, number))
    process.start()
    return process


def _run_process(given: dict[str, Any], listener: socket.socket, number: int) -> None:
    """Serve until a signal, or until the process that started this one is gone."""
    settings = Settings(**given)
    stop_logging = configure_logging(settings.logging)
    try:
        code = _serve_here(settings, listener, number=number)
    except ConfigError as error:
        print(f"llm-service: {error}", file=sys.stderr, flush=True)
        code = 2
    finally:
        stop_logging()
    sys.exit(code)


def warn_of_variables() -> None:
    """Log which variables nobody reads, of those that were probably meant for the service."""
    for variable in unread_variables(os.environ, Path(".env")):
        log.warning(str(variable))


def warn_of_workers(settings: Settings) -> None:
    """Log what several processes cost, and that an older configuration asked for them."""
    if settings.workers > 1 and settings.model.engine not in ("echo", "remote"):
        log.warning("each process loads models of its own; one would batch all requests", workers=settings.workers)
    if settings.compat.workers > 1 and settings.workers == 1:
        log.warning("one process serves, which batches all requests; several need redis.url", workers=1)


def server_config(app: FastAPI, settings: Settings, **options: Any) -> ServerConfig:
    """Return uvicorn's configuration, with as many connections as the settings and the open files allow."""
    metrics = app.state.container.metrics
    limits = ConnectionLimits.for_files(settings, raise_file_limit())
    guard = ConnectionGuard(limits, clock=time.monotonic, on_close=metrics.connection_closed)
    metrics.watch_connections(lambda: guard.open)
    if limits.total < settings.security.max_connections:
        log.warning("fewer connections than configured, because few files may be open", connections=limits.total)
    return ServerConfig(app, guard, trusted_proxies=settings.app.trusted_proxies, **options)


async def _serve(
    app: FastAPI, settings: Settings, config: uvicorn.Config, listener: socket.socket, *, number: int
) -> int:
    container: Container = app.state.container
    await container.access.open()
    server = DrainingServer(config, partial(_drain, container), settings.app.shutdown_grace_seconds)
    port = listener.getsockname()[1]
    if (parent := multiprocessing.parent_process()) is not None:
        asyncio.get_running_loop().add_reader(parent.sentinel, server.end, parent.sentinel)
    async with asyncio.TaskGroup() as background:
        wait_ready = _default_ready(container)
        if number == 0 and settings.model.preload:
            progress = partial(_load_progress, container)
            loading = background.create_task(show_loading(settings.model, progress, sys.stderr))
            wait_ready = partial(_show_until_ready, loading, wait_ready)
        announcing = background.create_task(announce_when_ready(wait_ready, server, settings, port, quiet=number > 0))
        await server.serve([listener])
        announcing.cancel()
    return 0 if announcing.cancelled() or announcing.result() else 1


async def _drain(container: Container, grace_seconds: float) -> None:
    """Let running requests finish, and end the loads of models, which nobody would use any more."""
    async with asyncio.TaskGroup() as draining:
        draining.create_task(container.host.drain(grace_seconds))
        draining.create_task(container.loader.end_loads())


async def _show_until_ready(loading: asyncio.Task[None], wait_ready: Callable[[], Awaitable[None]]) -> None:
    """Wait for the model, and let what is shown of its load be gone before anything else is printed."""
    try:
        await wait_ready()
    finally:
        loading.cancel()
        await asyncio.wait([loading])


def _load_progress(container: Container) -> LoadProgress | None:
    """Return how far the load of the default model is; None once it is over."""
    try:
        return container.host.default.engine.status().progress
    except ModelNotFound:
        return None


def _default_ready(container: Container) -> Callable[[], Awaitable[None]]:
    """Return what waits for the default model; a service that does not need it waits for nothing."""
    if container.settings.model.required:
        return container.host.default.engine.wait_ready

    async def at_once() -> None:
        return

    return at_once


async def announce_when_ready(
    wait_ready: Callable[[], Awaitable[None]],
    server: DrainingServer,
    settings: Settings,
    port: int,
    *,
    quiet: bool = False,
) -> bool:
    """Print how to use the service once it answers; stop the server and return False if the model cannot be loaded.

    Args: quiet: another process prints it.
    """
    try:
        await wait_ready()
        await server.listening.wait()
    except AppError as error:
        if server.stopping:
            return True
        print(f"llm-service: {error.message}", file=sys.stderr, flush=True)
        server.should_exit = True
        return False
    # Objects alive now live as long as the process: a full collection that visits them pauses all streams for 0.1 s.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    if not quiet:
        code = page_code(settings) if sys.stdout.isatty() else None
        print(how_to_use(settings, port, code=code), flush=True)
    return True


def page_code(settings: Settings) -> str | None:
    """Return a code that signs a browser in once, with the key that the service made; None if there is no such key."""
    key_file = settings.app.data_dir / KEY_FILE
    if not settings.security.page or settings.security.api_key or not key_file.exists():
        return None
    try:
        return new_code(settings.app.data_dir, time.time())
    except OSError as error:
        log.warning("there is no link for a browser: the data folder cannot be written", error=error.strerror)
        return None


def how_to_use(settings: Settings, port: int, *, code: str | None = None) -> str:
    """Return the lines printed at the start, with a curl command that works as printed.

    Args: code: signs a browser in; for a terminal, and in no log.
    """
    host = settings.app.host
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    url = f"http://{shown}:{port}"
    key_file = (settings.app.data_dir / KEY_FILE).resolve()
    if settings.security.api_key:
        where, key = "the one you set as SECURITY__API_KEY or API_KEY", "'X-API-Key: YOUR-KEY'"
    else:
        where, key = f"in {key_file}", f'"X-API-Key: $(cat {shlex.quote(str(key_file))})"'
    page = []
    if code:
        good = f"works once, for {VALID_SECONDS // 60} minutes"
        page = [f"Talk to it in a browser, with this link that {good}:", "", f"  {url}/#key={code}", ""]
    elif settings.security.page:
        page = ["Talk to it in a browser: open that address, and enter the key."]
    return "\n".join(
        [
            "",
            f"{settings.app.name} is ready: {url}  (model {settings.model.public_name})",
            *page,
            f"API key: {where}",
            "Try it in another terminal:",
            "",
            f"  curl {url}/v1/chat -H {key} -H 'Content-Type: application/json' \\",
            """    -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'""",
            "",
        ]
    )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.set_inheritable(False)
    except OSError as error:
        hint = "; another program uses it. Choose a free one: make run ARGS='--port 8001'"
        reason = f"{error.strerror}{hint if error.errno == errno.EADDRINUSE else ''}"
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from None
    return listener
