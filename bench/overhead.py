"""Measure what the service itself costs, without a model, beside a bare FastAPI application in the same run.

    python -m bench.overhead [--rounds 3] [--seconds 4]

Both run as their own process and are asked over loopback by one client process: whole answers of 32 characters, streams
of 32 chunks, and (ours only) answers from the cache.  The figures are medians over rounds that take turns, so that a
noisy machine hits both; only the ratios say something about another machine.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KEY = "bench-key-0123456789"
PROMPT = "a prompt of thirty-two letters.."


@dataclass(frozen=True)
class Load:
    """One kind of request, sent by some clients at once."""

    name: str
    clients: int
    stream: bool = False
    cache: bool = False


LOADS = (
    Load("whole, 1 client", 1),
    Load("whole, 32 clients", 32),
    Load("stream, 1 client", 1, stream=True),
    Load("stream, 32 clients", 32, stream=True),
    Load("from the cache, 1 client", 1, cache=True),
)


@dataclass(frozen=True)
class Figures:
    """What one round showed."""

    per_second: float
    p50_ms: float


def request(load: Load) -> bytes:
    """Return the bytes of one request."""
    body = json.dumps({"prompt": PROMPT, "stream": load.stream, "cache": load.cache}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def read_answer(reader: asyncio.StreamReader) -> None:
    """Read one response to its end.  Raises: RuntimeError: it is not a 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        length = head.split(b"content-length:")[1].split(b"\r\n")[0]
        await reader.readexactly(int(length))


async def client(port: int, load: Load, until: float) -> list[float]:
    """Send requests over one connection, one after the other; return the seconds of each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    message, took = request(load), []
    while (began := time.perf_counter()) < until:
        writer.write(message)
        await read_answer(reader)
        took.append(time.perf_counter() - began)
    writer.close()
    return took


async def measure(port: int, load: Load, seconds: float) -> Figures:
    """Put a load on a service for a while."""
    until = time.perf_counter() + seconds
    each = await asyncio.gather(*(client(port, load, until) for _ in range(load.clients)))
    took = [second for one in each for second in one]
    return Figures(len(took) / seconds, 1000 * statistics.median(took))


@contextmanager
def serving(*command: str) -> Iterator[int]:
    """Run a service on a free port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {"MODEL__ENGINE": "echo", "RATE_LIMIT__ENABLED": "false", "SECURITY__API_KEY": KEY}
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"APP__DATA_DIR": folder, "LOGGING__LEVEL": "WARNING"}
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until_ready(port)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def wait_until_ready(port: int) -> None:
    """Raises: TimeoutError: the service did not come up."""
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz")  # a fixed scheme and host
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing answers on port {port}")


def median(rounds: list[Figures]) -> Figures:
    return Figures(
        statistics.median(figures.per_second for figures in rounds),
        statistics.median(figures.p50_ms for figures in rounds),
    )


def main() -> None:
    """Print a table: ours, the bare application, and how much of its rate is ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4)
    arguments = parser.parse_args()
    bare_command = ("uvicorn", "bench.bare:app", "--log-level", "warning", "--no-access-log")
    print("| load | ours /s | ours p50 ms | bare /s | bare p50 ms | ours / bare |\n|---|---|---|---|---|---|")
    with serving("app", "serve") as ours, serving(*bare_command) as bare:
        for load in LOADS:
            pairs = []
            for _ in range(arguments.rounds):
                first = asyncio.run(measure(ours, load, arguments.seconds))
                pairs.append((first, asyncio.run(measure(bare, load, arguments.seconds))))
            us, them = median([pair[0] for pair in pairs]), median([pair[1] for pair in pairs])
            print(
                f"| {load.name} | {us.per_second:.0f} | {us.p50_ms:.1f} | {them.per_second:.0f} "
                f"| {them.p50_ms:.1f} | {us.per_second / them.per_second:.2f} |"
            )


if __name__ == "__main__":
    main()
