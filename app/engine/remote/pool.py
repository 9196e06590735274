"""Sends each request to one of several servers: the least loaded, or the one that has its session already.

A request goes to another server only before any byte of an answer.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

from app.config.remote import RemoteConfig
from app.engine.remote.connections import UpstreamResponse
from app.engine.remote.failures import BUSY_STATUSES, GATEWAY_STATUSES, ErrorReader, UpstreamError, is_fault
from app.engine.remote.upstream import Upstream
from app.errors import AppError, EngineNotReady
from app.requests import GenerationRequest
from app.telemetry.tracing import NO_TRACER, Tracer

MAX_IMBALANCE = 8
"""A session leaves its server where that has so many more requests than the least loaded one."""
HEALTH_SECONDS = 10.0
"""Between two probes of servers that serve."""
_LOST_STATUSES = frozenset([401, 403, 404])
"""The key or the model is no longer known there; a probe tells more."""


class UpstreamPool:
    """The servers of one engine."""

    def __init__(self, config: RemoteConfig, name: str, tracer: Tracer = NO_TRACER) -> None:
        """Args: name: the model's."""
        self.upstreams = tuple(Upstream(number, url, config, tracer) for number, url in enumerate(config.base_urls, 1))
        secrets = [value.get_secret_value() for value in config.headers.values()]
        secrets += [config.api_key.get_secret_value()] if config.api_key else []
        secrets += [each for upstream in self.upstreams for each in (upstream.root, upstream.address)]
        self.errors = ErrorReader(tuple(secrets))
        self._name = name
        self._probe_seconds = config.probe_seconds
        self._trouble = asyncio.Event()

    @property
    def ready(self) -> list[Upstream]:
        """Return the servers that get requests."""
        return [each for each in self.upstreams if each.is_ready]

    async def open(self) -> None:
        for upstream in self.upstreams:
            await upstream.open()

    async def close(self) -> None:
        for upstream in self.upstreams:
            await upstream.close()

    async def watch(self, on_probed: Callable[[], Awaitable[None]]) -> None:
        """Probe for ever: servers that failed after a short pause, the others now and then.

        Args: on_probed: called, and awaited, after each round.
        """
        due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            everyone = loop.time() >= due
            if everyone:
                due = loop.time() + HEALTH_SECONDS
            self._trouble.clear()
            probed = [each for each in self.upstreams if everyone or each.breaker.is_open]
            await asyncio.gather(*(each.probe(self._name) for each in probed))
            await on_probed()
            if len(self.ready) < len(self.upstreams):
                await asyncio.sleep(self._probe_seconds)
                continue
            try:
                async with asyncio.timeout(max(0.0, due - loop.time())):
                    await self._trouble.wait()
                    await asyncio.sleep(self._probe_seconds)
            except TimeoutError:
                continue

    def failed(self, upstream: Upstream, reason: str, *, for_certain: bool = False) -> None:
        """Count a request that a server failed."""
        upstream.failed(reason, for_certain=for_certain)
        if upstream.breaker.is_open:
            self._trouble.set()

    @asynccontextmanager
    async def stream(
        self, request: GenerationRequest, path: str, body: Callable[[Upstream], Mapping[str, Any]]
    ) -> AsyncIterator[tuple[Upstream, UpstreamResponse]]:
        """Send a request, and give the server and its response, of which no byte has been read.

        Args: body: what is sent to this server.
        Raises: AppError: no server takes it; what the last one said.
        """
        tried: Counter[Upstream] = Counter()
        error: AppError | None = None
        while (upstream := self._choose(request, tried)) is not None:
            tried[upstream] += 1
            with upstream.busy():
                try:
                    response = await upstream.send("POST", path, body(upstream))
                except UpstreamError as failure:
                    error = self._unreachable(upstream, failure)
                    # A connection that was kept may have been closed at this moment.
                    tried[upstream] += not failure.may_have_moved
                    continue
                try:
                    if response.status == 200:
                        yield upstream, response
                        return
                    error = await self._refusal(upstream, response)
                finally:
                    response.close()
            tried[upstream] += 1
            if response.status not in BUSY_STATUSES | GATEWAY_STATUSES | _LOST_STATUSES:
                break
        raise error or self.not_ready()

    async def fetch(
        self, request: GenerationRequest, path: str, body: Callable[[Upstream], Mapping[str, Any]]
    ) -> bytes:
        """Return the body of a whole answer.

        Raises: AppError: as `stream` does.
        """
        async with self.stream(request, path, body) as (upstream, response):
            try:
                return await response.body()
            except UpstreamError as failure:
                raise self._unreachable(upstream, failure) from None

    def not_ready(self) -> EngineNotReady:
        """Return the error for a request that no server can take now."""
        return EngineNotReady("The model's server cannot be reached; try again in a moment.", retry_after=2)

    def _unreachable(self, upstream: Upstream, failure: UpstreamError) -> EngineNotReady:
        self.failed(upstream, failure.reason, for_certain=failure.for_certain)
        return self.not_ready()

    async def _refusal(self, upstream: Upstream, response: UpstreamResponse) -> AppError:
        status = response.status
        if status in _LOST_STATUSES:
            self.failed(upstream, f"it answered with status {status}", for_certain=True)
        elif is_fault(status):
            self.failed(upstream, f"it answered with status {status}")
        try:
            content = await response.body()
        except UpstreamError:
            content = b""
        return self.errors.of_response(status, content, response.headers)

    def _choose(self, request: GenerationRequest, tried: Mapping[Upstream, int]) -> Upstream | None:
        """Return the server for a request; None if there is none left.

        Each session has its own order of all servers, so that it comes back to the one whose cache has its beginning,
        and all agree on its next one where that is down.
        """
        fresh = [each for each in self.ready if not tried.get(each)]
        again = [each for each in self.ready if tried.get(each) == 1]
        able = fresh or again
        if not able:
            return None
        least = min(able, key=lambda each: (each.running, each.number))
        if request.session_id is None:
            return least
        session = f"{request.tenant} {request.session_id}"
        own = max(able, key=lambda each: sha256(f"{session} {each.root}".encode()).digest())
        return own if own.running - least.running < MAX_IMBALANCE else least
