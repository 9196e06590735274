"""The level of the response cache that outlives the process."""

import asyncio
from typing import Any

import pytest
from msgspec import structs

from app.config import CacheConfig
from app.engine import persistent_cache
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.persistent_cache import PersistentCacheEngine
from app.errors import AppError, ServiceUnavailable
from app.events import CacheStatus, Delta, Event
from app.requests import GenerationRequest
from app.types import FinishReason, SamplingParams, Tenant
from tests.unit.engine.stores import DictStore
from tests.unit.event_streams import deltas_of, finished_of, read, started_of
from tests.waiting import HANG_SECONDS

HELLO = tuple(map(ord, "hello"))
SAMPLING = SamplingParams(max_tokens=9, logprobs=1)


def hello(**changes: Any) -> GenerationRequest:
    """Return a new request, since each has a progress of its own, for the same response."""
    fields: dict[str, Any] = {"tenant": Tenant.owner("tenant"), "prompt_ids": HELLO, "sampling": SAMPLING} | changes
    return GenerationRequest(id="one", **fields)


@pytest.fixture
def store() -> DictStore:
    return DictStore()


async def start(store: DictStore, scope: str = "", **options: Any) -> PersistentCacheEngine:
    engine = PersistentCacheEngine(EchoEngine(), store, scope=scope, **options)
    await engine.start()
    return engine


def statuses(events: list[Event]) -> list[CacheStatus]:
    return [started_of(events).cache, finished_of(events).cache]


async def test_another_process_replays_the_same_deltas(store: DictStore):
    """With their log-probabilities, and marked as replayed."""
    generated = await read((await start(store)).stream(hello()))
    replayed = await read((await start(store)).stream(hello()))

    assert [CacheStatus.MISS] * 2 == statuses(generated)
    assert [
        event if isinstance(event, Delta) else structs.replace(event, cache=CacheStatus.HIT) for event in generated
    ] == replayed


async def test_a_replay_below_the_memory_cache_is_a_hit(store: DictStore):
    """The level above has nothing stored, and yet nothing is generated: the caller learns so, the first time too."""
    await read((await start(store)).stream(hello()))
    engine = CachedEngine(await start(store), CacheConfig())
    request = hello()

    first, second = [await read(engine.stream(request)) for _ in range(2)]

    assert [CacheStatus.HIT] * 2 == statuses(first) == statuses(second)
    assert 0 == request.progress.generated


@pytest.mark.parametrize("first_streams", [True, False])
async def test_a_stored_response_serves_requests_that_stream_and_that_do_not(store: DictStore, first_streams: bool):
    """The request's kind of delivery does not decide its response."""
    engine = await start(store)

    first, second = [await read(engine.stream(hello(stream=stream))) for stream in (first_streams, not first_streams)]

    assert [CacheStatus.HIT] * 2 == statuses(second)
    assert deltas_of(first) == deltas_of(second)


async def test_what_could_change_the_response_generates_it_anew(store: DictStore):
    """Another tenant, parameter or filter policy; and who wants no cache neither reads nor fills it."""
    engine = await start(store)
    await read(engine.stream(hello()))

    for other in (hello(tenant=Tenant.owner("b")), hello(sampling=SamplingParams(max_tokens=8))):
        assert [CacheStatus.MISS] * 2 == statuses(await read(engine.stream(other)))
    assert [CacheStatus.MISS] * 2 == statuses(await read((await start(store, scope="other")).stream(hello())))
    before = dict(store.responses)
    assert [CacheStatus.BYPASS] * 2 == statuses(await read(engine.stream(hello(cache=False))))
    assert before == store.responses


async def test_an_unfinished_response_is_not_stored(store: DictStore):
    """Neither one that its reader leaves nor one that is aborted."""
    engine = await start(store)
    stream = engine.stream(hello())
    await anext(stream)
    await stream.aclose()
    aborted = engine.stream(hello())
    await anext(aborted)
    await engine.abort("one")
    assert FinishReason.ABORT is finished_of([event async for event in aborted]).finish_reason

    assert {} == store.responses


async def test_a_replay_can_be_aborted(store: DictStore):
    """Its end counts what was replayed."""
    engine = await start(store)
    await read(engine.stream(hello()))
    stream = engine.stream(hello())
    await anext(stream)
    await anext(stream)
    await engine.abort("one")

    (last,) = [event async for event in stream]
    assert FinishReason.ABORT is finished_of([last]).finish_reason
    assert 1 == finished_of([last]).usage.completion_tokens


@pytest.mark.parametrize("garbage", [b"", b"\x80\x04garbage", b"\x93\x01\x02\x03"])
async def test_what_cannot_be_read_is_a_miss(store: DictStore, garbage: bytes):
    """Nothing in a database is ever unpickled or trusted."""
    engine = await start(store)
    await read(engine.stream(hello()))
    for key in store.responses:
        store.responses[key] = garbage

    assert not finished_of(await read(engine.stream(hello()))).cached


@pytest.mark.parametrize("error", [None, ServiceUnavailable("the filter failed")])
async def test_a_response_that_masking_would_change_is_not_stored(store: DictStore, error: AppError | None):
    """Nor one that cannot be looked at; the caller gets it all the same, and the clean one is stored."""

    async def mask(tenant: Tenant, text: str, *, cut: bool = False) -> str:
        assert tenant == hello().tenant
        if error:
            raise error
        return text.replace("llo", "[X]")

    engine = await start(store, mask=mask)
    first = await read(engine.stream(hello()))
    await read(engine.stream(hello(prompt_ids=tuple(map(ord, "good day")))))

    assert "hello" == "".join(delta.text for delta in deltas_of(first))
    assert (0 if error else 1) == len(store.responses)


async def test_a_response_ends_without_being_stored_where_masking_takes_too_long(
    store: DictStore, monkeypatch: pytest.MonkeyPatch
):
    """The filter has a queue of its own, and nobody waits in it for the last event."""

    async def mask(tenant: Tenant, text: str, *, cut: bool = False) -> str:
        await asyncio.sleep(60)
        return text

    monkeypatch.setattr(persistent_cache, "MASK_SECONDS", 0.01)
    engine = await start(store, mask=mask)
    async with asyncio.timeout(HANG_SECONDS):
        events = await read(engine.stream(hello()))

    assert FinishReason.STOP == finished_of(events).finish_reason
    assert not store.responses
