"""Measure what the service itself costs, without a model, as ratios to a bare FastAPI route in the same run.

    python -m bench.overhead [--rounds 5] [--seconds 3] [--only "whole, 32"] [--tracing] [--profile FOLDER]

Both run as their own process and are asked over loopback by one client process: whole responses of 32 characters,
streams of 32 chunks, and (ours only) responses from the cache.  Ours runs the echo engine with default settings, rate
limits, PII filters, usage log and request log included; the limits are only too high to refuse anything.  The two
take turns, one asleep while the other is measured, and each ratio is the median over the rounds: only ratios say
something about another machine.

--tracing compares our service that sends a trace of each request with the same one that sends none.

--profile measures nothing: it writes a page for each load to FOLDER that says where the API process' time goes, by
package, module and function (`bench.profiling`).
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from bench import machine, profiling
from bench.generators import crossed_generators
from bench.process import KEY, ROOT, Server, free_port, our_command, our_environment, serving, stop_on_sigterm
from bench.wire import EventReader

PROMPT = "a prompt of thirty-two letters.."
WARM_UP_SECONDS = 1.0
SETTINGS = {
    "MODEL__ENGINE": "echo",
    "RATE_LIMIT__ENABLED": "true",
    "RATE_LIMIT__REQUESTS_PER_MINUTE": "10000000",
    "RATE_LIMIT__BURST_SIZE": "10000000",
    "RATE_LIMIT__TOKENS_PER_MINUTE": "10000000000",
    "LOGGING__LEVEL": "INFO",
}
"""On top of `our_environment`, which suits the comparison of models: the defaults, with limits that never refuse."""
BARE = (sys.executable, "-m", "uvicorn", "bench.bare:app", "--log-level", "warning", "--no-access-log", "--port")


@dataclass(frozen=True)
class Load:
    """One kind of request, sent by some clients at once, each its next when the last is answered."""

    name: str
    clients: int
    stream: bool = False
    cache: bool = False
    target: float | None = None
    """The ratio to the bare route that the service is to reach."""

    @property
    def slug(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


LOADS = (
    Load("whole, 1 client", 1, target=0.25),
    Load("whole, 32 clients", 32, target=0.20),
    Load("stream, 1 client", 1, stream=True),
    Load("stream, 32 clients", 32, stream=True, target=0.33),
    Load("cached, 1 client", 1, cache=True, target=0.30),
    Load("cached, 32 clients", 32, cache=True, target=0.30),
)


@dataclass(frozen=True)
class Figures:
    """What one round of a load showed on one server."""

    per_second: float
    p50_ms: float
    cpu_ms: float
    """Processor time of the server for each request."""
    client_share: float
    """How much of the time the client process was busy: near 1, it is what limits the rate."""

    @classmethod
    def median(cls, rounds: Sequence["Figures"]) -> "Figures":
        """Return the median of each figure on its own."""
        return cls(*(statistics.median(getattr(each, name) for each in rounds) for name in cls.__annotations__))


@dataclass(frozen=True)
class Round:
    """One round of a load on both servers."""

    ours: Figures
    bare: Figures

    @property
    def ratio(self) -> float:
        return self.ours.per_second / self.bare.per_second


def request(load: Load) -> bytes:
    """Return the bytes of one request."""
    body = json.dumps({"prompt": PROMPT, "stream": load.stream, "cache": load.cache}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def read_response(reader: asyncio.StreamReader) -> bytes:
    """Read one response to its end and return its body.

    Raises: RuntimeError: it is not a 200.
    """
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    if b"transfer-encoding: chunked" not in head:
        length = head.split(b"content-length:")[1].split(b"\r\n")[0]
        return await reader.readexactly(int(length))
    portions = []
    while size := int(await reader.readline(), 16):
        portions.append((await reader.readexactly(size + 2))[:size])
    await reader.readline()
    return b"".join(portions)


async def client(port: int, load: Load, until: float) -> list[float]:
    """Send requests over one connection, one after the other; return the seconds of each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    message, took = request(load), list[float]()
    while (began := time.perf_counter()) < until:
        writer.write(message)
        body = await read_response(reader)
        if not took:
            check(body, stream=load.stream)
        took.append(time.perf_counter() - began)
    writer.close()
    return took


def check(body: bytes, *, stream: bool) -> None:
    """A server that gives less back than it was sent would win.  Raises: RuntimeError: it did."""
    if stream:
        deltas = [json.loads(data) for name, data in EventReader().feed(body) if name == "delta"]
        text = "".join(delta["content"] for delta in deltas)
    else:
        text = json.loads(body)["generated_text"]
    if text != PROMPT:
        raise RuntimeError(f"sent {PROMPT!r}, got {text!r}")


async def measure(server: Server, load: Load, seconds: float) -> Figures:
    """Put a load on a server for a while."""
    began, busy, served = time.perf_counter(), time.process_time(), server.cpu_seconds()
    each = await asyncio.gather(*(client(server.port, load, began + seconds) for _ in range(load.clients)))
    lasted, busy, served = time.perf_counter() - began, time.process_time() - busy, server.cpu_seconds() - served
    took = [second for one in each for second in one]
    return Figures(len(took) / lasted, 1000 * statistics.median(took), 1000 * served / len(took), busy / lasted)


@contextmanager
def our_service(
    folder: Path, tool: profiling.Tool | None = None, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """Run our service until the block ends, prepared for a profiler if one is named.

    Args: settings: more of them.
    """
    port = free_port()
    command = profiling.command(tool, our_command(port), folder) if tool else our_command(port)
    environment = our_environment(folder, {**SETTINGS, **settings})
    with serving(command, port, environment, "/readyz", folder / f"ours-{port}.log") as server:
        yield server


@asynccontextmanager
async def collector() -> AsyncIterator[str]:
    """Take traces and throw them away; give the address."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    server = await asyncio.start_server(take, "127.0.0.1", 0, limit=1 << 20)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@contextmanager
def bare_service(folder: Path) -> Iterator[Server]:
    """Run the bare application until the block ends."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with serving([*BARE, str(port)], port, environment, "/readyz", folder / "bare.log") as server:
        yield server


async def compare(loads: Sequence[Load], folder: Path, rounds: int, seconds: float) -> Mapping[Load, list[Round]]:
    """Measure every load on our service and on the bare one."""
    with our_service(folder) as ours, bare_service(folder) as bare:
        return await take_turns(ours, bare, loads, rounds, seconds)


async def compare_traced(
    loads: Sequence[Load], folder: Path, rounds: int, seconds: float
) -> Mapping[Load, list[Round]]:
    """Measure every load on our service that sends traces, and in the place of the bare one on the same without."""
    (folder / "traced").mkdir()
    (folder / "untraced").mkdir()
    async with collector() as url:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        with our_service(folder / "traced", settings=settings) as traced, our_service(folder / "untraced") as untraced:
            return await take_turns(traced, untraced, loads, rounds, seconds)


async def take_turns(
    ours: Server, bare: Server, loads: Sequence[Load], rounds: int, seconds: float
) -> Mapping[Load, list[Round]]:
    """Measure every load on both servers, round by round, each server first in every other round."""
    found: dict[Load, list[Round]] = {load: [] for load in loads}

    async def awake(server: Server, load: Load, seconds: float) -> Figures:
        server.resume()
        try:
            return await measure(server, load, seconds)
        finally:
            server.pause()

    ours.pause()
    bare.pause()
    for load in loads:
        for server in (ours, bare):
            await awake(server, load, WARM_UP_SECONDS)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for load in loads:
            order = (ours, bare) if number % 2 == 0 else (bare, ours)
            figures = {server.port: await awake(server, load, seconds) for server in order}
            found[load].append(Round(figures[ours.port], figures[bare.port]))
    return found


def as_markdown(found: Mapping[Load, list[Round]], ours_name: str = "ours", bare_name: str = "bare") -> str:
    """Return the table of medians: both servers, the ratio of their rates, its range over the rounds, the target."""
    names = f"{ours_name} /s | p50 ms | CPU ms | {bare_name} /s | p50 ms | CPU ms | {ours_name} / {bare_name}"
    lines = [
        f"| load | {names} | range | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for load, rounds in found.items():
        ours, bare = Figures.median([each.ours for each in rounds]), Figures.median([each.bare for each in rounds])
        ratios = [each.ratio for each in rounds]
        cells = [f"{each.per_second:.0f} | {each.p50_ms:.1f} | {each.cpu_ms:.2f}" for each in (ours, bare)]
        ratio, target = statistics.median(ratios), "" if load.target is None else f"{load.target:.2f}"
        met = "" if load.target is None else " met" if ratio >= load.target else " missed"
        cells += [f"**{ratio:.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{target}{met}"]
        lines.append(f"| {load.name} | {' | '.join(cells)} |")
    busiest = max(each.client_share for rounds in found.values() for both in rounds for each in (both.ours, both.bare))
    lines += ["", f"The client process was busy for at most {100 * busiest:.0f} % of a measurement."]
    return "\n".join(lines)


async def profile(loads: Sequence[Load], tool: profiling.Tool, seconds: float, pages: Path) -> None:
    """Write a page for each load."""
    with tempfile.TemporaryDirectory() as name, our_service(Path(name), tool) as server:
        for load in loads:
            await measure(server, load, WARM_UP_SECONDS)
            with profiling.profiled(tool, server, seconds, Path(name)) as found:
                figures = await measure(server, load, seconds)
            page = pages / f"{load.slug}.md"
            page.write_text(profiling.as_markdown(found[0], f"{load.name}, by {tool}", 1000 * figures.cpu_ms))
            print(f"{page}: {figures.per_second:.0f} requests/s while profiled", flush=True)


def main() -> None:
    """Print the table of ratios, or write the profiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--only", default="", help="only loads whose name has this in it")
    parser.add_argument("--tracing", action="store_true", help="compare our service that sends traces with itself")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write profiles there instead of measuring")
    parser.add_argument("--tool", choices=get_args(profiling.Tool), default=profiling.installed_tool())
    arguments = parser.parse_args()
    loads = [load for load in LOADS if arguments.only in load.name]
    if not loads:
        parser.error(f"--only: no load has {arguments.only!r} in its name")
    stop_on_sigterm()
    print(machine.describe() + "\n", flush=True)
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        asyncio.run(profile(loads, arguments.tool, arguments.seconds, arguments.profile))
        return
    crossed = crossed_generators()
    print(f"A token crosses {len(crossed)} async generators of ours: {', '.join(crossed)}.\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, rounds, seconds = Path(name), arguments.rounds, arguments.seconds
        if arguments.tracing:
            # The targets are those of the comparison with a bare route.
            loads = [replace(load, target=None) for load in loads]
            found = asyncio.run(compare_traced(loads, folder, rounds, seconds))
            print(as_markdown(found, "traced", "not traced"))
        else:
            print(as_markdown(asyncio.run(compare(loads, folder, rounds, seconds))))


if __name__ == "__main__":
    main()
