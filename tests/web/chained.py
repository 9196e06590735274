"""An engine whose server is this service itself, with an engine of its own, over a real socket."""

import asyncio
import socket
from contextlib import AsyncExitStack
from typing import Any

from app.config import DeadlineConfig
from app.config.remote import RemoteConfig
from app.engine.base import Engine
from app.engine.remote.engine import RemoteEngine
from app.engine.wrapper import EngineWrapper
from app.server import server_config
from tests.waiting import until
from tests.web.harness import KEY, SignalFreeServer, make_web

UPSTREAM: dict[str, Any] = {
    "rate_limit": {"enabled": False},
    "pii": {"enabled": False},
    "cache": {"enabled": False},
    "deadlines": {"waiting_seconds": 60},
}
"""What leaves the engine behind the service as it is."""


class ChainedEngine(EngineWrapper):
    """A `RemoteEngine` with its server, which starts and ends with it."""

    def __init__(
        self, engine: Engine, *, name: str = "m", sections: dict[str, Any] | None = None, **remote: Any
    ) -> None:
        """Args:
        engine: generates at the server, as the model `name`.
        sections: of the server's configuration; remote: settings of the engine in front of it.
        """
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.upstream = engine
        self._name = name
        self._sections = UPSTREAM if sections is None else sections
        self._stack = AsyncExitStack()
        settings = {"base_urls": (self.url,), "api_key": KEY, "probe_seconds": 0.05, **remote}
        super().__init__(RemoteEngine(RemoteConfig.model_validate(settings), DeadlineConfig(), name=name))

    async def start(self) -> None:
        web = await make_web(engines={self._name: self.upstream}, **self._sections)
        await self.upstream.wait_ready()
        server = SignalFreeServer(server_config(web.app, web.container.settings, lifespan="off"))
        serving = asyncio.create_task(server.serve([self._socket]))
        await until(lambda: server.started)
        self._stack.push_async_callback(self._stop, server, serving)
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()
        await self._stack.aclose()
        self._socket.close()

    async def _stop(self, server: SignalFreeServer, serving: "asyncio.Task[None]") -> None:
        server.should_exit = True
        await serving
        await self.upstream.close()
