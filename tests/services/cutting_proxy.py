"""A proxy in front of Postgres that cuts connections at the worst moment: when a COMMIT is done and nobody knows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from tests.services.proxy import listening, pass_on


@dataclass
class CuttingProxy:
    """Passes everything on, but for the replies to some COMMITs."""

    port: int = 0
    cuts: int = 0
    """So many of the next COMMITs reach the server, and their replies nobody."""
    of: bytes = b""
    """Only of transactions that have sent this."""
    cut: int = 0
    """How many were cut."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: int) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", to)
        replying = asyncio.create_task(pass_on(from_server, writer))
        transaction = b""
        try:
            while data := await reader.read(65536):
                transaction = data if b"BEGIN" in data else transaction + data
                if b"COMMIT" in data and self.cuts and self.of in transaction:
                    self.cuts -= 1
                    self.cut += 1
                    replying.cancel()
                    await asyncio.wait([replying])
                    to_server.write(data)
                    await to_server.drain()
                    with suppress(TimeoutError):
                        # The reply, as the server has then committed.
                        await asyncio.wait_for(from_server.read(1), 5)
                    return
                to_server.write(data)
                await to_server.drain()
        except OSError:
            return
        finally:
            replying.cancel()
            writer.transport.abort()
            to_server.transport.abort()


@asynccontextmanager
async def cutting_proxy(to: int) -> AsyncIterator[CuttingProxy]:
    """Listen on a free port in front of the server on port `to`."""
    proxy = CuttingProxy()
    async with listening(partial(proxy.serve, to=to)) as proxy.port:
        yield proxy
