"""A proxy in front of a server that delays what passes through it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass


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
        replying = asyncio.create_task(self._reply(from_server, writer))
        try:
            with suppress(OSError):
                while data := await reader.read(65536):
                    to_server.write(data)
                    await to_server.drain()
        finally:
            replying.cancel()
            writer.transport.abort()
            to_server.transport.abort()

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.seconds)
                writer.write(data)
                await writer.drain()
            writer.close()


@asynccontextmanager
async def slow_proxy(to: int) -> AsyncIterator[SlowProxy]:
    """Listen on a free port in front of the server on port `to`."""
    proxy = SlowProxy()
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(proxy.serve(reader, writer, to)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
