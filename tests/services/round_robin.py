"""A small load balancer: each connection goes to the next server, or to another one where that refuses it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

from tests.services.proxy import listening, pass_on


class RoundRobin:
    """Passes connections on to the servers in turns."""

    def __init__(self, ports: Sequence[int]) -> None:
        """Args: ports: of the servers, on loopback."""
        self._ports = ports
        self._turns = count()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = next(self._turns)
        for port in (self._ports[(turn + step) % len(self._ports)] for step in range(len(self._ports))):
            try:
                from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            try:
                await asyncio.gather(pass_on(reader, to_server), pass_on(from_server, writer))
            finally:
                to_server.transport.abort()
                writer.transport.abort()
            return
        writer.transport.abort()


@asynccontextmanager
async def round_robin(ports: Sequence[int]) -> AsyncIterator[str]:
    """Listen in front of the servers until the block ends; gives the address."""
    async with listening(RoundRobin(ports).serve) as port:
        yield f"http://127.0.0.1:{port}"
