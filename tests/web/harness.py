"""The web application as `create_app` builds it, around a scripted service or around engines, with one key."""

import asyncio
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from msgspec import structs

from app.access.limits import configured
from app.config import Settings, load_settings
from app.engine.base import EncoderEngine, Engine, EngineInfo
from app.engine.echo import EchoEngine
from app.engine.host import ModelHost
from app.errors import EngineNotReady
from app.events import ContextUsage, Delta, DetokenizedLogprob, Event, Finished, FinishedSample, Started
from app.generation.sessions import SessionStore
from app.main import create_app
from app.requests import GenerationRequest
from app.server import server_config
from app.telemetry import Metrics
from app.types import FinishReason, Message, Principal, Rights, Tenant, Usage
from app.web.http.dependencies import Container
from tests.waiting import until

KEY = "web-tests-key-0123456789"
AUTH = {"X-API-Key": KEY}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
GENERATE: dict[str, Any] = {"prompt": "hello"}
BATCH: dict[str, Any] = {"prompts": ["hello"]}
BODIES: Mapping[str, dict[str, Any]] = {"/v1/generate": GENERATE, "/v1/chat": CHAT}
"""The native routes that stream."""
OPENAI_BODIES: Mapping[str, dict[str, Any]] = {"/v1/chat/completions": CHAT, "/v1/completions": GENERATE}
RESPONSE_BODIES: Mapping[str, dict[str, Any]] = {"/v1/responses": {"input": "hello"}}
COMPAT_BODIES: Mapping[str, dict[str, Any]] = {
    "/generate": GENERATE,
    "/predict": GENERATE,
    "/predict/batch": BATCH,
    "/v1/stream": GENERATE,
}
"""The routes of older services that generate."""
STORED_PATHS = ("/v1/files", "/v1/batches")
OPENAI_PATHS = (
    *OPENAI_BODIES,
    *RESPONSE_BODIES,
    *STORED_PATHS,
    "/v1/embeddings",
    "/v1/models",
    "/tokenize",
    "/detokenize",
)
LOADING_PATHS = ("/v1/models/load", "/v1/models/unload")
"""Below a path of OpenAI's, in the service's own words."""
MODEL = "scripted"

Step = str | Delta | float | asyncio.Event | BaseException
"""A text or a whole delta to send, for each sample, seconds or an event to wait for, or an error to end with."""


@dataclass
class ScriptedService:
    """Responds to every request with the same steps and records what became of each."""

    steps: list[Step] = field(default_factory=lambda: ["Hel", "lo"])
    refusal: Exception | None = None
    """Raised before the response begins."""
    refusal_after_seconds: float = 0
    finish_reason: FinishReason = FinishReason.STOP
    reasoning_tokens: int = 0
    """Of each sample."""
    ends: bool = True
    """False breaks the promise of a last event."""
    requests: list[GenerationRequest] = field(default_factory=list)
    principals: list[Principal] = field(default_factory=list)
    """Who sent each of the requests."""
    running: int = 0
    closed_at: float = math.inf
    """The loop's time when the last response was over."""

    async def generate(self, request: GenerationRequest, principal: Principal) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.principals.append(principal)
        self.running += 1
        try:
            await asyncio.sleep(self.refusal_after_seconds)
            if self.refusal:
                raise self.refusal
            prompt = None if request.is_chat else str(request.text or request.prompt_ids)
            yield Started(model=MODEL, prompt=prompt, prompt_tokens=3)
            for step in self.steps:
                match step:
                    case str():
                        for index in range(request.n):
                            logprobs = _logprobs(step, request.sampling.logprobs)
                            yield Delta(text=step, index=index, logprobs=logprobs, tokens=1)
                    case Delta():
                        for index in range(request.n):
                            yield structs.replace(step, index=index)
                    case BaseException():
                        raise step
                    case asyncio.Event():
                        await step.wait()
                    case _:
                        await asyncio.sleep(step)
            if self.ends:
                yield Finished(
                    model=MODEL,
                    samples=(self._end,) * request.n,
                    usage=Usage(prompt_tokens=3, completion_tokens=2 * request.n, cached_tokens=1),
                    session_id=request.session_id,
                    context=ContextUsage(limit=100, prompt_tokens=3, turns_kept=1, turns_dropped=0)
                    if request.is_chat
                    else None,
                )
        finally:
            self.running -= 1
            self.closed_at = asyncio.get_running_loop().time()

    @property
    def _end(self) -> FinishedSample:
        return FinishedSample(
            finish_reason=self.finish_reason, completion_tokens=2, reasoning_tokens=self.reasoning_tokens
        )

    async def storable(self, tenant: Tenant, messages: Sequence[Message]) -> list[Message]:
        return list(messages)

    def status(self) -> Mapping[str, Any]:
        return {"engine": {"state": "ready"}}


def _logprobs(text: str, alternatives: int | None) -> tuple[DetokenizedLogprob, ...]:
    """Return one token for each step, with as many alternatives as are requested."""
    if alternatives is None:
        return ()
    top = tuple(DetokenizedLogprob(f"{text}{rank}", b"", -rank) for rank in range(alternatives))
    return (DetokenizedLogprob(text, text.encode(), -0.5, top),)


class RecordingEngine(EchoEngine):
    """Records the requests that reach it; some facts of its description can be replaced."""

    def __init__(self, model: str = MODEL, **facts: Any) -> None:
        super().__init__(model=model)
        self.requests: list[GenerationRequest] = []
        self.facts = facts

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, **self.facts)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        async with aclosing(super().stream(request)) as events:
            async for event in events:
                yield event


class LoadingEngine(EchoEngine):
    """Never becomes ready, and has no description before that."""

    @property
    def info(self) -> EngineInfo:
        raise EngineNotReady("The model is still loading; try again in a moment.", retry_after=5)

    async def start(self) -> None:
        return


_ADMIN = Rights(load_models=True, manage_keys=True)


@dataclass
class OneKey:
    """Knows one key, an admin's, and no database."""

    settings: Settings
    rights: Rights = _ADMIN

    async def authenticate(self, presented: bytes) -> Principal | None:
        if presented != KEY.encode():
            return None
        limits = configured(self.settings.rate_limit, self.settings.quota)
        return Principal("admin", Tenant.configured(), limits=limits, rights=self.rights)


@dataclass
class Web:
    """One application under test and what stands behind it."""

    app: FastAPI
    service: ScriptedService
    """Receives nothing where the real service runs."""

    @property
    def container(self) -> Container:
        container: Container = self.app.state.container
        return container

    @property
    def host(self) -> ModelHost:
        return self.container.host

    @property
    def metrics(self) -> Metrics:
        return self.container.metrics

    @property
    def sessions(self) -> SessionStore:
        assert self.container.sessions is not None
        return self.container.sessions

    @asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        """Call the application without a socket, with a valid key unless `headers` say otherwise."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers or AUTH) as client:
            yield client

    @asynccontextmanager
    async def listening(self, **options: Any) -> AsyncIterator[int]:
        """Serve on a loopback socket, in this loop, and give its port.

        Args: options: of the server, beside those that the settings say.
        """
        options |= {"lifespan": "off", "timeout_graceful_shutdown": 2}
        config = server_config(self.app, self.container.settings, **options)
        server = SignalFreeServer(config)
        # With its protocol named, asyncio sends each write at once, as uvloop does.
        with socket.socket(proto=socket.IPPROTO_TCP) as listener:
            listener.bind(("127.0.0.1", 0))
            serving = asyncio.create_task(server.serve([listener]))
            await until(lambda: server.started)
            yield listener.getsockname()[1]
            server.should_exit = True
            await serving


class SignalFreeServer(uvicorn.Server):
    """A server that leaves the signals of the test process alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


HIGH_RATE = {"requests_per_minute": 100_000, "burst_size": 100_000}


async def make_web(
    service: ScriptedService | None = None,
    *,
    engines: Mapping[str, Engine] | None = None,
    encoders: Mapping[str, EncoderEngine] | None = None,
    **sections: dict[str, Any],
) -> Web:
    """Build the application with one key and no database.

    Args:
        service: what the routes call.  With `engines` and without it, the real service runs.
        engines: by public model name, the default one first.
        encoders: the same for models that only embed.
    """
    nowhere = {"url": "sqlite:////nowhere/service.db"}
    security = {"api_key": KEY, **sections.pop("security", {})}
    defaults = {"rate_limit": HIGH_RATE, "database": nowhere, "security": security}
    config = load_settings("absent.yml", None, **{**defaults, **sections})
    scripted = service or ScriptedService()
    app = create_app(
        config,
        engines=engines or {MODEL: EchoEngine(model=MODEL)},
        encoders=encoders,
        service=scripted if service or not engines else None,
        keys=OneKey(config),
    )
    web = Web(app=app, service=scripted)
    await web.host.start()
    return web


_started: list[FastAPI] = []
"""Applications that run now."""


@asynccontextmanager
async def started(app: FastAPI) -> AsyncIterator[None]:
    """Run an application's lifespan in a task of its own, as a server does.

    A fixture may end in another task than the one in which it began, and a lifespan must not.
    """
    begun, ended = asyncio.Event(), asyncio.Event()
    before = asyncio.all_tasks()
    _started.append(app)

    async def run() -> None:
        try:
            async with app.router.lifespan_context(app):
                begun.set()
                await ended.wait()
        finally:
            begun.set()

    running = asyncio.create_task(run())
    await begun.wait()
    try:
        if not running.done():
            yield
    finally:
        ended.set()
        await running
        _started.remove(app)
        # Those of another one that runs beside it are looked for when that ends.
        left = set() if _started else asyncio.all_tasks() - before - {asyncio.current_task()}
        assert not left, f"tasks run after the application has ended: {left}"


def speaks_openai(path: str) -> bool:
    """Return whether errors of a path have OpenAI's envelope."""
    return path.startswith(OPENAI_PATHS) and path not in LOADING_PATHS


def is_envelope(response: httpx.Response) -> bool:
    """Return whether a response is the complete error envelope of its path's dialect, with the right request id."""
    body = response.json()
    if speaks_openai(response.request.url.path):
        return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return set(body) == {"error", "message", "details", "timestamp", "request_id"} and (
        body["request_id"] == response.headers["x-request-id"]
    )


def frames(text: str) -> list[tuple[str, str]]:
    """Split a stream into (event, data); comments are left out."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            found.append((lines["event"], lines["data"]))
    return found
