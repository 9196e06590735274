"""A server with OpenAI's routes that sends the bytes that a test says, over a real socket."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from app.config import DeadlineConfig
from app.config.remote import RemoteConfig
from app.engine.remote.engine import RemoteEngine
from tests.waiting import HANG_SECONDS

Step = bytes | float
"""Bytes to send, or seconds to wait for the client to hang up."""
FOREVER = 60.0
DONE = b"data: [DONE]\n\n"
CARD: dict[str, Any] = {"id": "m", "object": "model", "owned_by": "someone"}


def chunk(content: str | None = None, **fields: Any) -> bytes:
    """Return a chunk of a chat's stream.  Args: fields: of its choice, beside the delta's text."""
    delta = {} if content is None else {"content": content}
    return event({"choices": [{"index": 0, "delta": delta | fields.pop("delta", {}), **fields}]})


def event(body: Any) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


def usage(prompt: int, completion: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


@dataclass
class Reply:
    """What is sent for one request."""

    steps: Sequence[Step] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    """Before the first byte."""
    drops: bool = False
    """Whether the connection breaks in place of an answer."""
    resets: bool = False
    """Whether the connection breaks in place of its end."""

    @classmethod
    def json(cls, body: Any, status: int = 200, **headers: str) -> "Reply":
        kind = {"content-type": "application/json"}
        return cls([json.dumps(body).encode()], status, kind | {k.replace("_", "-"): v for k, v in headers.items()})


HELLO = Reply([chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), usage(7, 2), DONE])


@dataclass
class Received:
    """One request for a completion."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class ScriptedServer:
    """Answers every request for a completion alike, or with the next of several replies."""

    replies: list[Reply] = field(default_factory=lambda: [HELLO])
    """The last one is repeated."""
    models: Reply = field(default_factory=lambda: Reply.json({"data": [CARD]}))
    others: dict[str, Reply] = field(default_factory=dict)
    """For other paths."""
    received: list[Received] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    """Requests for each path."""
    hung_up: int = 0
    """Replies during which the client went away."""
    live: int = 0
    port: int = 0
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        """Listen, where it listened before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            path = first.split()[1]
            self.live += 1
            try:
                await self._reply(self._choose(path, headers, body), reader, writer)
            finally:
                self.live -= 1
        writer.close()

    def _choose(self, path: str, headers: dict[str, str], body: bytes) -> Reply:
        self.requests[path] += 1
        if path == "/v1/models":
            return self.models
        if not path.endswith("completions"):
            return self.others.get(path) or Reply.json({"detail": "Not Found"}, 404)
        self.received.append(Received(path, headers, json.loads(body)))
        return self.replies[min(len(self.received), len(self.replies)) - 1]

    async def _reply(self, reply: Reply, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reply.drops:
            return
        if reply.delay_seconds and await self._gone(reader, reply.delay_seconds):
            return
        headers = {"content-type": "text/event-stream", "connection": "close"} | reply.headers
        lines = [f"HTTP/1.1 {reply.status} -", *(f"{name}: {value}" for name, value in headers.items() if value)]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        for step in reply.steps:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif await self._gone(reader, step):
                return
        if reply.resets:
            await asyncio.sleep(0.02)
            writer.transport.abort()

    async def _gone(self, reader: asyncio.StreamReader, seconds: float) -> bool:
        """Wait, and return whether the client has hung up."""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                await reader.read()
                self.hung_up += 1
                return True
        return False


@asynccontextmanager
async def serving(*servers: ScriptedServer) -> AsyncIterator[None]:
    """Run servers."""
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        for server in servers:
            await server.stop()


QUICK = DeadlineConfig(waiting_seconds=5, first_token_seconds=5, total_seconds=10)


def make_engine(*servers: ScriptedServer, deadlines: DeadlineConfig = QUICK, **remote: Any) -> RemoteEngine:
    """Return an engine over servers that have their ports, not started."""
    urls = [server.url for server in servers]
    config = RemoteConfig.model_validate({"base_urls": urls, "probe_seconds": 0.05, **remote})
    return RemoteEngine(config, deadlines, name="m")


@asynccontextmanager
async def engine_on(*servers: ScriptedServer, **settings: Any) -> AsyncIterator[RemoteEngine]:
    """Run servers and an engine over them that is ready."""
    async with serving(*servers):
        engine = make_engine(*servers, **settings)
        await engine.start()
        try:
            async with asyncio.timeout(HANG_SECONDS):
                await engine.wait_ready()
            yield engine
        finally:
            await engine.close()
