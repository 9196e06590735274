"""A client that sends any bytes and reads what comes back, for requests that no HTTP library would send."""

import asyncio
import re
from collections.abc import Iterable
from contextlib import suppress

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
AGAIN = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def statuses(answer: bytes) -> tuple[int, ...]:
    """Return the status of each response in these bytes."""
    return tuple(int(status) for status in _STATUS.findall(answer))


class RawClient:
    """One connection; use it as `async with RawClient(port) as client`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.answer = b""
        """Everything received so far."""
        self.reset = False
        """Whether the server reset the connection, which may have cost bytes of its answer."""

    async def __aenter__(self) -> "RawClient":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    async def send(self, packets: Iterable[bytes]) -> None:
        """Send each packet in a packet of its own, as long as the server takes them."""
        with suppress(ConnectionError):
            for packet in packets:
                self._writer.write(packet)
                await self._writer.drain()
                await asyncio.sleep(0)

    async def read_responses(self, count: int) -> None:
        """Read until so many responses have begun and the last has ended, by its length."""
        while len(statuses(self.answer)) < count or not self._last_has_ended():
            if not await self._read():
                return

    async def read_to_end(self) -> None:
        """Read until the server closes."""
        while await self._read():
            pass

    async def _read(self) -> bool:
        try:
            data = await self._reader.read(65536)
        except ConnectionError:
            self.reset = True
            return False
        self.answer += data
        return bool(data)

    def _last_has_ended(self) -> bool:
        head, found, body = self.answer[self.answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        return bool(found) and (length is None or len(body) >= int(length[1]))


async def exchange(port: int, packets: Iterable[bytes], count: int, *, closes: bool) -> tuple[RawClient, bool]:
    """Send a request in packets and read the responses; return the client, and whether the connection is still usable.

    Args:
        count: responses to wait for.
        closes: whether the server is to close then; if not, one more request asks whether it serves the next.
    """
    async with RawClient(port) as client:
        sending = asyncio.create_task(client.send(packets))
        await client.read_responses(count)
        await sending
        before = len(statuses(client.answer))
        if not closes:
            await client.send([AGAIN])
        await client.read_to_end()
        usable = statuses(client.answer)[before:] == (200,)
        if usable:
            client.answer = client.answer[: client.answer.rindex(b"HTTP/1.1 ")]
        return client, usable
