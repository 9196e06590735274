"""The level of the response cache that outlives the process."""

from dataclasses import replace

import pytest

from app.engine.base import Chunk, GenerationRequest
from app.engine.echo import EchoEngine
from app.engine.persistent_cache import StoredEngine
from app.types import FinishReason, SamplingParams
from tests.unit.engine.stores import DictStore

REQUEST = GenerationRequest("one", "tenant", tuple(map(ord, "hello")), SamplingParams(max_tokens=9, logprobs=1))


async def read(engine: StoredEngine, request: GenerationRequest = REQUEST) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(request)]


@pytest.fixture
async def store() -> DictStore:
    return DictStore()


async def make(store: DictStore, scope: str = "") -> StoredEngine:
    engine = StoredEngine(EchoEngine(), store, scope=scope)
    await engine.start()
    return engine


async def test_another_process_replays_the_same_pieces(store: DictStore):
    """With their log-probabilities, and marked as cached."""
    made = await read(await make(store))
    replayed = await read(await make(store))

    assert [replace(chunk, cached=True) for chunk in made] == replayed


async def test_what_could_change_the_answer_makes_it_anew(store: DictStore):
    """Another tenant, setting or filter policy; and who wants no cache neither reads nor fills it."""
    engine = await make(store)
    await read(engine)

    for other in (replace(REQUEST, tenant="b"), replace(REQUEST, params=SamplingParams(max_tokens=8))):
        assert not (await read(engine, other))[0].cached
    assert not (await read(await make(store, scope="other")))[0].cached
    before = dict(store.answers)
    assert not (await read(engine, replace(REQUEST, cache=False)))[0].cached
    assert before == store.answers


async def test_an_unfinished_answer_is_not_kept(store: DictStore):
    """Neither one that its reader leaves nor one that is aborted."""
    engine = await make(store)
    stream = engine.stream(REQUEST)
    await anext(stream)
    await stream.aclose()
    aborted = engine.stream(REQUEST)
    await anext(aborted)
    await engine.abort("one")
    assert FinishReason.ABORT is [chunk async for chunk in aborted][-1].finish_reason

    assert {} == store.answers


async def test_a_replay_can_be_aborted(store: DictStore):
    engine = await make(store)
    await read(engine)
    stream = engine.stream(REQUEST)
    await anext(stream)
    await anext(stream)
    await engine.abort("one")

    (last,) = [chunk async for chunk in stream]
    assert FinishReason.ABORT is last.finish_reason
    assert last.usage is not None
    assert 1 == last.usage.completion_tokens


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04garbage", b"\x93\x01\x02\x03"])
async def test_what_cannot_be_read_is_a_miss(store: DictStore, garbage: bytes):
    """Nothing in a database is ever unpickled or trusted."""
    engine = await make(store)
    await read(engine)
    for key in store.answers:
        store.answers[key] = garbage

    assert not (await read(engine))[0].cached
