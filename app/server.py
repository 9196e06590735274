"""Runs the application on a socket: binds, tells how to use it, drains on a signal, and returns an exit code.

Knows uvicorn and the terminal; `cli.py` calls it.
"""

import asyncio
import errno
import gc
import shlex
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from app.access.bootstrap_key import KEY_FILE
from app.config import Settings
from app.errors import AppError, ConfigError
from app.main import create_app
from app.telemetry import configure_logging

log = structlog.get_logger(__name__)

_FLUSH_SECONDS = 5
"""How long last events may take to reach their clients once draining is over."""


class DrainingServer(uvicorn.Server):
    """A uvicorn that finishes its work before it closes its sockets; a second signal stops it at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        """Args: drain: refuses new work and returns when the old is done."""
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def stopping(self) -> bool:
        """Whether a signal has come."""
        return self.should_exit or self._draining is not None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._draining is not None:
            self.should_exit = self.force_exit = True
        else:
            # A signal interrupts the loop anywhere, so the work itself waits for the loop's next turn.
            self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, reason: str) -> None:
        log.info("draining", signal=reason)
        self._draining = asyncio.get_running_loop().create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True


def run(settings: Settings) -> int:
    """Serve until a signal; return the exit code.

    Raises: ConfigError: the port is taken, or a file that the service needs is missing.
    """
    listener = _bind(settings.app.host, settings.app.port)
    stop_logging = configure_logging(settings.logging)
    try:
        key_file = settings.app.data_dir / KEY_FILE
        first_start = settings.security.api_key is None and not key_file.exists()
        app = create_app(settings)
        if first_start:
            print(f"\nYour API key, made now and kept in {key_file.resolve()}:\n\n  {key_file.read_text()}", flush=True)
        config = _uvicorn(app, settings)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_serve(app, settings, config, listener))
    finally:
        stop_logging()
        listener.close()


def _uvicorn(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=list(settings.app.trusted_proxies),
        proxy_headers=bool(settings.app.trusted_proxies),
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )


async def _serve(app: FastAPI, settings: Settings, config: uvicorn.Config, listener: socket.socket) -> int:
    await app.state.open_database()
    server = DrainingServer(config, app.state.drain)
    greeted = asyncio.create_task(_greet(app.state.wait_ready, server, settings, listener.getsockname()[1]))
    await server.serve([listener])
    return 0 if not greeted.done() or await greeted else 1


async def _greet(
    wait_ready: Callable[[], Awaitable[None]], server: DrainingServer, settings: Settings, port: int
) -> bool:
    """Say how to use the service once the model is there; end it and return False if the model cannot be loaded."""
    try:
        await wait_ready()
    except AppError as error:
        if server.stopping:
            return True
        print(f"llm-service: {error.message}", file=sys.stderr, flush=True)
        server.should_exit = True
        return False
    # What is left now stays: looking through it for garbage would hold all streams up for a tenth of a second.
    gc.collect()
    gc.freeze()
    print(how_to_use(settings, port), flush=True)
    return True


def how_to_use(settings: Settings, port: int) -> str:
    """Return the lines that a person needs for a first answer; the curl works as printed."""
    host = settings.app.host
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    url = f"http://{shown}:{port}"
    key_file = (settings.app.data_dir / KEY_FILE).resolve()
    if settings.security.api_key:
        where, key = "the one you set as SECURITY__API_KEY", "'X-API-Key: YOUR-KEY'"
    else:
        where, key = f"in {key_file}", f'"X-API-Key: $(cat {shlex.quote(str(key_file))})"'
    return "\n".join(
        [
            "",
            f"{settings.app.name} is ready: {url}  (model {settings.model.public_name})",
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
