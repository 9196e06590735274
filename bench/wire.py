"""One streamed request over a socket of its own, with the time at which each text delta of the response arrived.

Plain asyncio, because the client shares the processors with the servers that it measures.  Speaks HTTP and server-sent
events; loads and statistics are in `bench.load` and `bench.figures`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


class RequestFailed(Exception):
    """A server refused a request or ended it early; the message is the server's."""


@dataclass(frozen=True)
class Post:
    """An HTTP POST request with a JSON body."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the bytes of the request; `Connection: close` makes the end of the connection that of the response."""
        body = json.dumps(self.body).encode()
        headers = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json", **self.headers}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


@dataclass(frozen=True)
class StreamEvent:
    """One parsed event of a stream."""

    text: str = ""
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the completion, where the server counts them."""
    error: str | None = None


ParseEvent = Callable[[str, str], StreamEvent]
"""Parses one event from its name and its data."""


@dataclass
class TimedResponse:
    """A finished response with its times, in seconds on one clock."""

    began: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each event with text arrived."""
    text: str = ""
    worded: float = 0.0
    """When the first event came that has more than blanks."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def first_word(self) -> float:
        return self.worded - self.began

    @property
    def first_token(self) -> float:
        return self.arrivals[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Return the inter-token latencies: seconds from each event with text to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


class EventReader:
    """Parses server-sent events from bytes that arrive in any portions."""

    def __init__(self) -> None:
        self._rest = b""
        self._name, self._data = "", list[str]()

    def feed(self, portion: bytes) -> list[tuple[str, str]]:
        """Return the name (often empty) and the data of each event that is complete now."""
        *lines, self._rest = (self._rest + portion).split(b"\n")
        return [event for line in lines if (event := self._line(line.removesuffix(b"\r").decode())) is not None]

    def _line(self, line: str) -> tuple[str, str] | None:
        name, _, value = line.partition(":")
        match name:
            case "event":
                self._name = value.removeprefix(" ")
            case "data":
                self._data.append(value.removeprefix(" "))
            case "" if not line and self._data:
                event = self._name, "\n".join(self._data)
                self._name, self._data = "", []
                return event
        return None


async def send(port: int, post: Post, parse: ParseEvent) -> TimedResponse:
    """Send a request and read its response to the end.

    Raises: RequestFailed: the server refused it, ended early, or never sent the number of tokens.
    """
    response = TimedResponse(began=time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(post.encode())
        async for portion in _events(reader):
            now = time.perf_counter()
            for name, data in portion:
                _add(response, parse(name, data), now)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise RequestFailed(f"the connection broke: {error!r}") from None
    finally:
        writer.close()
    response.ended = time.perf_counter()
    if not response.arrivals or not response.completion_tokens:
        raise RequestFailed("the response ended without text or without a count of its tokens")
    return response


def _add(response: TimedResponse, event: StreamEvent, now: float) -> None:
    if event.error is not None:
        raise RequestFailed(event.error)
    if event.text:
        response.arrivals.append(now)
        response.text += event.text
        if not response.worded and event.text.strip():
            response.worded = now
    if event.usage is not None:
        response.prompt_tokens, response.completion_tokens = event.usage


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[list[tuple[str, str]]]:
    """Yield the events of each portion of the body as it comes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = head.split(" ", 2)[1]
    if status != "200":
        said = (await reader.read()).decode(errors="replace")
        raise RequestFailed(f"HTTP {status}: {said.strip()[:300]}")
    if "transfer-encoding: chunked" not in head.lower():
        raise RequestFailed("the response is not a stream")
    events = EventReader()
    while size := int(await reader.readuntil(b"\n"), 16):
        portion = await reader.readexactly(size + 2)
        yield events.feed(portion[:size])
