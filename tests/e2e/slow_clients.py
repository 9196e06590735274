"""Opens many connections that send next to nothing, until it is ended: `python -m tests.e2e.slow_clients PORT COUNT`.

A program of its own, so that it takes no time from the client whose waiting is measured.  Each connection is opened
again as soon as the server closes it, after a short pause.
"""

import asyncio
import os
import sys
from contextlib import suppress
from itertools import cycle

from app.web.http.connections import raise_file_limit

PAUSE_SECONDS = 2.0
HEAD = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\n"
WAYS = (
    b"",
    HEAD,
    HEAD + b"X-Slow: a",
    HEAD + b"Content-Length: 100000\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
)
"""What a connection begins with; after that it drips."""


async def stay(port: int, begin: bytes, opened: asyncio.Semaphore) -> None:
    """Be one slow client, again and again."""
    first = True
    while True:
        with suppress(OSError):
            async with opened:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(begin)
                if first:
                    os.write(1, b".")  # tells its parent
                    first = False
                while not reader.at_eof():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1024), PAUSE_SECONDS)
                    writer.write(b"a" if begin else b"")
            finally:
                writer.transport.abort()
        await asyncio.sleep(PAUSE_SECONDS)


async def main(port: int, count: int) -> None:
    raise_file_limit()
    opened = asyncio.Semaphore(64)
    await asyncio.gather(*(stay(port, way, opened) for way, _ in zip(cycle(WAYS), range(count), strict=False)))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
