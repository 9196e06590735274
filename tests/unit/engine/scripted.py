"""An engine whose events a test scripts, for tests of what stands around an engine."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from msgspec import structs

from app.engine.base import EngineStatus
from app.engine.echo import EchoEngine
from app.events import Delta, Event, Started, finish
from app.requests import GenerationRequest, Progress
from app.types import FinishReason, SamplingParams, Tenant, Usage

REQUEST = GenerationRequest(
    id="1", tenant=Tenant.owner("ann"), prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=64)
)


def make_request(request_id: str, **changes: Any) -> GenerationRequest:
    """Return REQUEST under another id, with other fields as given."""
    return structs.replace(REQUEST, id=request_id, progress=Progress(), **changes)


class ScriptedEngine(EchoEngine):
    """Generates one delta of one token for each `step()`, and records its requests and how their streams ended."""

    def __init__(
        self,
        *texts: str | Delta,
        error: Exception | None = None,
        end: FinishReason = FinishReason.STOP,
        model: str = "echo",
    ) -> None:
        """Args:
        texts: one for each delta, or the delta itself.
        error: raised after the deltas, or in place of Started if there are none.
        """
        super().__init__(model=model)
        self.texts: tuple[str | Delta, ...] = texts
        self.error, self.end = error, end
        self.requests: list[GenerationRequest] = []
        self.live: list[str] = []
        """Ids of requests whose generator is open."""
        self.closed: list[str] = []
        """Ids of requests whose generator has been closed, in that order."""
        self.aborted: list[str] = []
        self.cleanup_error: Exception | None = None
        """Raised when a generator is closed."""
        self.waiting = asyncio.Event()
        """Set once it waits for the step of a first delta."""
        self.cleaning_up = asyncio.Event()
        """Set once it cleans up after a request."""
        self.may_clean_up = asyncio.Event()
        self.may_clean_up.set()
        self._steps = asyncio.Semaphore(0)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self._steps.release()

    def run_freely(self) -> "ScriptedEngine":
        """Return itself, set to generate without waiting for steps."""
        self.step(10_000)
        return self

    def pause(self, *texts: str | Delta) -> None:
        """Generate other texts from now on, and wait for steps again."""
        self.texts, self._steps = texts, asyncio.Semaphore(0)
        self.waiting.clear()

    def status(self) -> EngineStatus:
        return replace(super().status(), running=len(self.live))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        if self.error is not None and not self.texts:
            raise self.error
        self.live.append(request.id)
        try:
            yield Started(prompt_tokens=request.prompt_tokens)
            for text in self.texts:
                self.waiting.set()
                await self._steps.acquire()
                request.progress.generated += 1
                yield text if isinstance(text, Delta) else Delta(text=text, tokens=1)
            if self.error is not None:
                raise self.error
            yield finish(self.end, Usage(request.prompt_tokens, len(self.texts)))
        finally:
            self.cleaning_up.set()
            try:
                # A clean-up that takes a while, as a real one may: nobody may go on before it is over.
                await asyncio.sleep(0)
                await self.may_clean_up.wait()
                if self.cleanup_error is not None:
                    raise self.cleanup_error
            finally:
                # Whoever is cancelled while it cleans up lets go all the same.
                self.live.remove(request.id)
                self.closed.append(request.id)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
