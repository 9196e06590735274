"""A proxy in front of a server that delays what passes through it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from tests.services.proxy import listening, pass_on


@dataclass
class SlowProxy:
    """Passes everything on, each part of a reply so much later."""

    port: int = 0
    seconds: float = 0
    """Of delay; may be changed at any time."""
    connections: int = 0
    """Accepted so far."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: int) -> None:
        self.connections += 1
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            writer.transport.abort()
            return
        replying = asyncio.create_task(pass_on(from_server, writer, delay=lambda: self.seconds))
        try:
            with suppress(OSError):
                while data := await reader.read(65536):
                    to_server.write(data)
                    await to_server.drain()
        finally:
            replying.cancel()
            writer.transport.abort()
            to_server.transport.abort()


@asynccontextmanager
async def slow_proxy(to: int) -> AsyncIterator[SlowProxy]:
    """Listen on a free port in front of the server on port `to`."""
    proxy = SlowProxy()
    async with listening(partial(proxy.serve, to=to)) as proxy.port:
        yield proxy
