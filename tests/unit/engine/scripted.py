"""An engine that says what it is told, for tests of what stands around an engine."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from app.engine.base import Chunk, Engine, GenerationRequest
from app.engine.echo import EchoEngine
from app.types import FinishReason, SamplingParams, Usage


class ScriptedEngine(EchoEngine):
    """Says what it is told, one piece for each `step()`, and records who asked and how it ended."""

    def __init__(self, *pieces: str, error: Exception | None = None, end: FinishReason = FinishReason.STOP) -> None:
        """Args: error: raised after the pieces, or before the first chunk if there are none."""
        super().__init__()
        self.pieces, self.error, self.end = pieces, error, end
        self.calls: list[GenerationRequest] = []
        self.closed: list[str] = []
        self.aborted: list[str] = []
        self.steps = asyncio.Semaphore(0)
        self.reached = asyncio.Event()
        """Set once it waits to say its first piece."""
        self.cleared = asyncio.Event()
        """How long it takes to let go of a request that has ended."""
        self.cleared.set()
        self.clearing = asyncio.Event()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.steps.release()

    def run_freely(self) -> "ScriptedEngine":
        self.step(10_000)
        return self

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.calls.append(request)
        if self.error is not None and not self.pieces:
            raise self.error
        try:
            yield Chunk()
            for piece in self.pieces:
                self.reached.set()
                await self.steps.acquire()
                yield Chunk(text=piece, tokens=1)
            if self.error is not None:
                raise self.error
            yield Chunk(finish_reason=self.end, usage=Usage(len(request.prompt_ids), len(self.pieces)))
        finally:
            self.clearing.set()
            await asyncio.sleep(0)
            await self.cleared.wait()
            self.closed.append(request.id)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


REQUEST = GenerationRequest(id="1", tenant="ann", prompt_ids=(1, 2, 3), params=SamplingParams(max_tokens=64))


def ask(request_id: str, **changes: object) -> GenerationRequest:
    return replace(REQUEST, id=request_id, **changes)


async def read(engine: Engine, request: GenerationRequest) -> list[Chunk]:
    async with aclosing(engine.stream(request)) as chunks:
        return [chunk async for chunk in chunks]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)
