"""The web application as `create_app` builds it, around a service whose answers a test writes beforehand."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.access.limits import configured
from app.config import Settings, load_settings
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.engine.tokenizer.logprob_text import AnswerToken
from app.generation.requests import ChatAsk, CompletionAsk, Context, Delta, Ending, Event, Finished, Started
from app.generation.sessions import MemorySessionStore, SessionStore
from app.stores.memory_admission import MemoryAdmissionStore
from app.telemetry import Metrics
from app.types import FinishReason, Principal, Rights, Usage
from app.web.app_factory import build_app
from app.web.http.dependencies import Parts
from app.web.http.rate_limits import FailedKeyLimiter

KEY = "web-tests-key-0123456789"
AUTH = {"X-API-Key": KEY}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
GENERATE = {"prompt": "hello"}
BATCH = {"prompts": ["hello"]}
BODIES: Mapping[str, dict[str, Any]] = {"/v1/generate": GENERATE, "/v1/chat": CHAT}
"""The native routes that stream."""
OPENAI_BODIES: Mapping[str, dict[str, Any]] = {"/v1/chat/completions": CHAT, "/v1/completions": GENERATE}
OPENAI_PATHS = (*OPENAI_BODIES, "/v1/models")
MODEL = "scripted"

Step = str | float | BaseException
"""A text to send, seconds to wait, or an error to end with."""


@dataclass
class ScriptedService:
    """Answers every ask with the same steps and remembers what became of each."""

    steps: list[Step] = field(default_factory=lambda: ["Hel", "lo"])
    refusal: Exception | None = None
    """Raised before the answer begins."""
    refusal_after_seconds: float = 0
    finish_reason: FinishReason = FinishReason.STOP
    ends: bool = True
    """False breaks the promise of a last event."""
    sessions: SessionStore | None = None
    asks: list[CompletionAsk | ChatAsk] = field(default_factory=list)
    running: int = 0
    closed_at: float | None = None
    """The loop's time when the last answer was over."""

    async def complete(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        async for event in self._play(ask, Started(model=MODEL, prompt=str(ask.prompt), prompt_tokens=3), None):
            yield event

    async def chat(self, ask: ChatAsk) -> AsyncGenerator[Event, None]:
        async for event in self._play(ask, Started(model=MODEL, prompt_tokens=3), ask.session_id):
            yield event

    async def _play(
        self, ask: CompletionAsk | ChatAsk, started: Started, session_id: str | None
    ) -> AsyncGenerator[Event, None]:
        self.asks.append(ask)
        self.running += 1
        try:
            await asyncio.sleep(self.refusal_after_seconds)
            if self.refusal:
                raise self.refusal
            yield started
            for step in self.steps:
                match step:
                    case str():
                        for index in range(ask.sampling.n):
                            yield Delta(text=step, index=index, tokens=_tokens(step, ask.sampling.logprobs), made=1)
                    case BaseException():
                        raise step
                    case _:
                        await asyncio.sleep(step)
            if self.ends:
                yield Finished(
                    model=MODEL,
                    endings=(Ending(finish_reason=self.finish_reason, tokens=2),) * ask.sampling.n,
                    usage=Usage(prompt_tokens=3, completion_tokens=2 * ask.sampling.n, cached_tokens=1),
                    cached=False,
                    session_id=session_id,
                    context=Context(limit=100, prompt_tokens=3, turns_kept=1, turns_dropped=0),
                )
        finally:
            self.running -= 1
            self.closed_at = asyncio.get_running_loop().time()

    async def status(self) -> Mapping[str, Any]:
        return {"engine": {"state": "ready"}}


def _tokens(text: str, logprobs: int | None) -> tuple[AnswerToken, ...]:
    """One token for each step, with as many alternatives as requested."""
    if logprobs is None:
        return ()
    top = tuple(AnswerToken(f"{text}{rank}", b"", -rank) for rank in range(logprobs))
    return (AnswerToken(text, text.encode(), -0.5, top),)


@dataclass(frozen=True)
class OneKey:
    """Knows one key, an admin's, and no database."""

    settings: Settings

    async def authenticate(self, presented: bytes) -> Principal | None:
        if presented != KEY.encode():
            return None
        limits = configured(self.settings.rate_limit, self.settings.quota)
        return Principal("admin", "admin", limits=limits, rights=Rights(load_models=True, manage_keys=True))


async def _unmasked(text: str) -> str:
    return text


class SignalFreeServer(uvicorn.Server):
    """A server that installs no signal handlers in the test process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Web:
    """One application under test and what stands behind it."""

    app: FastAPI
    service: ScriptedService
    engines: EngineRegistry
    metrics: Metrics

    @asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        """Call the application without a socket, with a valid key unless `headers` say otherwise."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers or AUTH) as client:
            yield client

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Serve on a loopback socket, in this loop, and give its port."""
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        server = SignalFreeServer(config)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            serving = asyncio.create_task(server.serve([listener]))
            await until(lambda: server.started)
            yield listener.getsockname()[1]
            server.should_exit = True
            await serving


HIGH_RATE = {"requests_per_minute": 100_000, "burst_size": 100_000}


async def make_web(service: ScriptedService | None = None, **sections: dict[str, Any]) -> Web:
    """Build the application as `create_app` does, around a scripted service."""
    nowhere = {"url": "sqlite:////nowhere/service.db"}
    config = load_settings("absent.yml", None, **{"rate_limit": HIGH_RATE, "database": nowhere, **sections})
    service = service or ScriptedService()
    if service.sessions is None and config.chat_history.enabled:
        service.sessions = MemorySessionStore(config.chat_history)
    engines = EngineRegistry({MODEL: EchoEngine(model=MODEL)})
    await engines.start()
    metrics = Metrics(models=[MODEL])
    access = AccessControl(config, configured_key=KEY, bootstrap_key=None, mask=_unmasked, on_drop=lambda count: None)
    admission = AdmissionControl(
        MemoryAdmissionStore(), access.quotas, enabled=config.rate_limit.enabled, on_refusal=metrics.rate_limited
    )
    container = Parts(
        settings=config,
        service=service,
        engines=engines,
        keys=OneKey(config),
        access=access,
        admission=admission,
        failed_keys=FailedKeyLimiter(config.security.failed_keys_per_minute, on_refusal=metrics.rate_limited),
        metrics=metrics,
    )
    return Web(app=build_app(container), service=service, engines=engines, metrics=metrics)


def is_envelope(response: httpx.Response) -> bool:
    """Return whether a response is the complete error envelope of its path's dialect, with the right request id."""
    body = response.json()
    if response.request.url.path.startswith(OPENAI_PATHS):
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


async def until(condition: Callable[[], bool], seconds: float = 2) -> None:
    """Wait for something that another task does."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.005)
