"""Which engines are loaded, who uses them now, and how they are emptied.

Decides whether a request may start (the model is known, the service is not draining) and remembers every live request
until it ends, so that a shutdown can wait for them and then end those that are left.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.engine.base import Engine
from app.errors import ModelNotFound, ShuttingDown


class EngineRegistry:
    """The engines by their public name; lives as long as the application."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        """Args: engines: by model name; the first serves requests that name no model."""
        self._engines = engines
        self.since = int(time.time())
        """When they were put together, in seconds since 1970."""
        self._live: dict[str, Engine] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """New requests are refused; live ones may finish."""
        self.over = False
        """The grace period has ended: nothing may start any more, not even what was taken in before."""

    @property
    def default(self) -> Engine:
        return next(iter(self._engines.values()))

    @property
    def default_name(self) -> str:
        return next(iter(self._engines))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models, the default one first."""
        return tuple(self._engines)

    def find(self, model: str | None) -> Engine:
        """Return the engine of a model, or the default one for None.

        Raises: ModelNotFound: no such model is loaded.
        """
        engine = self._engines.get(self.default_name if model is None else model)
        if engine is None:
            raise ModelNotFound("This model is not loaded; leave `model` out to use the one that is.")
        return engine

    @asynccontextmanager
    async def lease(self, model: str | None, request_id: str) -> AsyncIterator[Engine]:
        """Hold an engine for one request, and free its place when the request ends in whatever way.

        Raises:
            ShuttingDown: the service takes no new work.
            ModelNotFound: no such model is loaded.
        """
        if self.draining:
            raise ShuttingDown()
        engine = self.find(model)
        self._live[request_id] = engine
        self._idle.clear()
        try:
            yield engine
        finally:
            # Closing a chain does not close the model's stream at once: free its place ourselves.
            try:
                await engine.abort(request_id)
            finally:
                del self._live[request_id]
                if not self._live:
                    self._idle.set()

    async def start(self) -> None:
        for engine in self._engines.values():
            await engine.start()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let the live ones finish, and end what is left after the grace period."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_seconds)
        except TimeoutError:
            self.over = True
            for request_id, engine in list(self._live.items()):
                await engine.abort(request_id)

    async def close(self) -> None:
        """Stop every engine; live requests end with FinishReason.ABORT."""
        self.draining = True
        for engine in self._engines.values():
            await engine.close()
