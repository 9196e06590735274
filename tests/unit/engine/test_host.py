"""Who uses which engine, and how they are emptied."""

import asyncio

import pytest

from app.engine.base import Chunk, GenerationRequest
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.errors import ModelNotFound, ShuttingDown
from app.types import FinishReason, SamplingParams


async def read(registry: EngineRegistry, request_id: str) -> list[Chunk]:
    request = GenerationRequest(request_id, "t", tuple(map(ord, "hello")), SamplingParams(max_tokens=10))
    async with registry.lease(None, request_id) as engine:
        return [chunk async for chunk in engine.stream(request)]


async def started(token_delay_seconds: float = 0) -> EngineRegistry:
    registry = EngineRegistry({"echo": EchoEngine(token_delay_seconds=token_delay_seconds)})
    await registry.start()
    return registry


async def test_an_unknown_model_is_not_found() -> None:
    """A name that is not loaded raises before any work."""
    registry = await started()

    with pytest.raises(ModelNotFound):
        async with registry.lease("other", "r"):
            pass


async def test_draining_lets_live_requests_finish_and_refuses_new_ones() -> None:
    """The drain returns when the last live request has ended by itself."""
    registry = await started(token_delay_seconds=0.01)
    live = asyncio.create_task(read(registry, "a"))
    await asyncio.sleep(0.01)

    drain = asyncio.create_task(registry.drain(grace_seconds=5))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await read(registry, "b")
    await drain

    assert live.done() or await live
    assert FinishReason.STOP == (await live)[-1].finish_reason


async def test_after_the_grace_period_live_requests_end_with_abort() -> None:
    """What is left is ended with a last chunk, not cut."""
    registry = await started(token_delay_seconds=0.05)
    live = asyncio.create_task(read(registry, "a"))
    await asyncio.sleep(0.06)

    await registry.drain(grace_seconds=0.01)

    assert FinishReason.ABORT == (await live)[-1].finish_reason


async def test_leaving_a_lease_frees_the_engines_place_even_if_the_stream_is_left_open() -> None:
    """A chain that forgets to close its stream does not hold the model."""
    registry = await started(token_delay_seconds=0.01)
    request = GenerationRequest("a", "t", tuple(map(ord, "hello")), SamplingParams(max_tokens=10))

    async with registry.lease(None, "a") as engine:
        stream = engine.stream(request)
        await anext(stream)

    assert FinishReason.ABORT == [chunk async for chunk in stream][-1].finish_reason
