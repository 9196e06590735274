"""Identical requests that meet share one generation, and it lives exactly as long as somebody reads it."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from app.config import CacheConfig
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.errors import EngineBusy, EngineFailed
from app.events import CacheStatus, Delta, Event, Finished, Started, finish
from app.types import FinishReason, SamplingParams, Tenant, Usage
from tests.unit.engine.scripted import ScriptedEngine, make_request
from tests.unit.event_streams import deltas_of, finished_of, read, started_of, text_of
from tests.waiting import HANG_SECONDS

ABORTED = finish(FinishReason.ABORT, Usage(3, 1))
"""The end of a request for which one token had come."""


async def test_fifty_equal_requests_at_once_are_one_generation():
    """All get the whole response; one had it generated, the others shared it."""
    inner = ScriptedEngine("a", "b", "c").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    responses = await asyncio.gather(*(read(engine.stream(make_request(str(number)))) for number in range(50)))

    assert 1 == len(inner.requests)
    assert {"abc"} == {text_of(each) for each in responses}
    assert 49 == sum(finished_of(each).cached for each in responses)
    assert inner.requests[0].id not in {str(number) for number in range(50)}


async def test_a_follower_reads_along_live():
    """Who joins late gets what is there at once, and the rest as it is generated."""
    inner = ScriptedEngine("a", "b", "c")
    engine = CachedEngine(inner, CacheConfig())
    leader, follower = engine.stream(make_request("1")), engine.stream(make_request("2"))
    async with aclosing(leader), aclosing(follower), asyncio.timeout(HANG_SECONDS):
        await anext(leader)
        inner.step(2)
        leads = [await anext(leader) for _ in range(2)]
        follows = [await anext(follower) for _ in range(3)]
        waiting = asyncio.create_task(anext(follower))
        await asyncio.sleep(0.01)
        early = waiting.done()
        inner.step()
        late = await waiting

    assert [Delta(text="a", tokens=1), Delta(text="b", tokens=1)] == leads
    assert [Started(prompt_tokens=3, cache=CacheStatus.HIT), *leads] == follows
    assert not early
    assert Delta(text="c", tokens=1) == late


async def test_the_generation_outlives_the_client_that_began_it():
    """The leader leaves; the follower gets the whole response, and it is stored."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    leader = engine.stream(make_request("1"))
    await anext(leader)
    follower = asyncio.create_task(read(engine.stream(make_request("2"))))
    await asyncio.sleep(0)

    await leader.aclose()
    inner.step(2)
    response = await asyncio.wait_for(follower, HANG_SECONDS)
    replay = await read(engine.stream(make_request("3")))

    assert "ab" == text_of(response) == text_of(replay)
    assert FinishReason.STOP is finished_of(response).finish_reason
    assert 1 == len(inner.requests)
    assert [] == inner.aborted


async def leave(engine: CachedEngine, reader: AsyncGenerator[Event, None], request_id: str) -> None:
    await reader.aclose()


async def abort(engine: CachedEngine, reader: AsyncGenerator[Event, None], request_id: str) -> None:
    await engine.abort(request_id)


@pytest.mark.parametrize("go", [leave, abort])
async def test_the_last_reader_to_go_ends_the_generation(
    go: Callable[[CachedEngine, AsyncGenerator[Event, None], str], Awaitable[None]],
):
    """It is over when the call returns, nothing is stored, and the next equal request begins a new one."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    readers = {name: engine.stream(make_request(name)) for name in ("1", "2")}
    for reader in readers.values():
        await anext(reader)

    await go(engine, readers["1"], "1")
    closed_before = list(inner.closed)
    await go(engine, readers["2"], "2")
    closed, aborted = list(inner.closed), list(inner.aborted)
    inner.step(2)
    again = await read(engine.stream(make_request("3")))

    assert [] == closed_before
    assert [inner.requests[0].id] == closed == aborted
    assert not finished_of(again).cached
    assert 2 == len(inner.requests)
    for reader in readers.values():
        await reader.aclose()


async def test_who_comes_while_the_last_reader_leaves_gets_a_generation_of_its_own():
    """A response that is being given up is nobody's any more."""
    inner = ScriptedEngine("a")
    engine = CachedEngine(inner, CacheConfig())
    first = engine.stream(make_request("1"))
    await anext(first)
    inner.may_clean_up.clear()
    leaving = asyncio.create_task(first.aclose())
    await inner.cleaning_up.wait()

    coming = asyncio.create_task(read(engine.stream(make_request("2"))))
    await asyncio.sleep(0)
    inner.step()
    inner.may_clean_up.set()
    response = await asyncio.wait_for(coming, HANG_SECONDS)
    await leaving

    assert FinishReason.STOP is finished_of(response).finish_reason
    assert not finished_of(response).cached
    assert 2 == len(inner.requests)


async def test_who_comes_while_a_cut_short_response_ends_gets_a_new_one():
    """Its last event is out, but the inner engine still cleans up."""
    inner = ScriptedEngine("a", end=FinishReason.ABORT).run_freely()
    engine = CachedEngine(inner, CacheConfig())
    inner.may_clean_up.clear()
    first = engine.stream(make_request("1"))
    while not isinstance(await anext(first), Finished):
        pass

    inner.end = FinishReason.STOP
    coming = asyncio.create_task(read(engine.stream(make_request("2"))))
    await asyncio.sleep(0)
    inner.may_clean_up.set()
    response = await asyncio.wait_for(coming, HANG_SECONDS)
    await first.aclose()

    assert FinishReason.STOP is finished_of(response).finish_reason


async def test_the_inner_engine_cleans_up_undisturbed():
    """An abort and the closing of the aborted stream end the generation once, and both wait for it."""
    inner = ScriptedEngine("a")
    engine = CachedEngine(inner, CacheConfig())
    stream = engine.stream(make_request("1"))
    await anext(stream)
    inner.may_clean_up.clear()

    ending = [asyncio.create_task(engine.abort("1"))]
    await inner.cleaning_up.wait()
    ending.append(asyncio.create_task(stream.aclose()))
    await asyncio.sleep(0.01)
    waited = [task.done() for task in ending]
    inner.may_clean_up.set()
    await asyncio.gather(*ending)

    assert [False, False] == waited
    assert [inner.requests[0].id] == inner.closed


async def test_an_error_after_everybody_left_bothers_nobody():
    """asyncio would print an exception that no one looks at."""
    inner, complaints = ScriptedEngine("a"), []
    engine = CachedEngine(inner, CacheConfig())
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    stream = engine.stream(make_request("1"))
    await anext(stream)
    inner.cleanup_error = RuntimeError("the clean-up failed")

    await stream.aclose()
    await asyncio.sleep(0)
    gc.collect()

    assert [] == complaints


async def test_an_abort_ends_only_its_own_stream():
    """The aborted one ends with what it got, the other continues."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    first, second = engine.stream(make_request("1")), engine.stream(make_request("2"))
    await anext(first), await anext(second)
    inner.step()
    await anext(first), await anext(second)

    await engine.abort("1")
    ended = [event async for event in first]
    inner.step()
    rest = [event async for event in second]

    assert [ABORTED] == ended
    assert "b" == text_of(rest)
    assert FinishReason.STOP is finished_of(rest).finish_reason


async def test_a_waiting_reader_learns_of_its_abort_at_once():
    """No token has to come first."""
    inner = ScriptedEngine("never")
    engine = CachedEngine(inner, CacheConfig())
    reading = asyncio.create_task(read(engine.stream(make_request("1"))))
    await inner.waiting.wait()

    await engine.abort("1")
    events = await asyncio.wait_for(reading, HANG_SECONDS)

    assert FinishReason.ABORT is finished_of(events).finish_reason


async def test_a_replay_can_be_aborted():
    """The same promise for a stored response."""
    engine = CachedEngine(ScriptedEngine("a", "b").run_freely(), CacheConfig())
    await read(engine.stream(make_request("1")))
    replay = engine.stream(make_request("2"))
    async with aclosing(replay):
        await anext(replay), await anext(replay)
        await engine.abort("2")
        rest = [event async for event in replay]

    assert [ABORTED] == rest


async def test_a_cancelled_request_frees_the_model():
    """A task that is cancelled while it waits for a token leaves like one that closes its stream."""
    inner = ScriptedEngine("never")
    engine = CachedEngine(inner, CacheConfig())
    reading = asyncio.create_task(read(engine.stream(make_request("1"))))
    await inner.waiting.wait()
    busy = (engine.readers, engine.generating)

    reading.cancel()
    await asyncio.wait([reading])

    assert [inner.requests[0].id] == inner.closed
    assert (1, 1) == busy
    assert (0, 0) == (engine.readers, engine.generating)


@pytest.mark.parametrize("texts", [(), ("a",)])
async def test_an_error_reaches_all_who_joined_and_is_not_stored(texts: tuple[str, ...]):
    """Before the first event or after some text: everyone gets it, and the next request tries again."""
    inner = ScriptedEngine(*texts, error=EngineFailed("The model's worker died.")).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    outcomes = await asyncio.gather(
        *(read(engine.stream(make_request(str(number)))) for number in range(5)), return_exceptions=True
    )
    inner.error, inner.texts = None, ("fine",)
    after = await read(engine.stream(make_request("after")))

    assert [EngineFailed] * 5 == [type(outcome) for outcome in outcomes]
    assert "fine" == text_of(after)
    assert 2 == len(inner.requests)


async def test_a_refusal_comes_in_place_of_the_first_event():
    """A busy engine's error is raised at the first `anext`, and no reader is left."""
    engine = CachedEngine(ScriptedEngine(error=EngineBusy("Full.")), CacheConfig())

    with pytest.raises(EngineBusy):
        await anext(engine.stream(make_request("1")))
    await asyncio.sleep(0)

    assert (0, 0) == (engine.readers, engine.generating)


async def test_closing_ends_live_streams_and_leaves_no_task():
    """Readers get FinishReason.ABORT, and stored text is gone."""
    inner = ScriptedEngine("a", "b").run_freely()
    engine = CachedEngine(inner, CacheConfig())
    await read(engine.stream(make_request("1", tenant=Tenant.owner("bob"))))
    inner.pause("never")
    reading = asyncio.create_task(read(engine.stream(make_request("2"))))
    await inner.waiting.wait()

    await engine.close()
    events = await asyncio.wait_for(reading, HANG_SECONDS)

    assert FinishReason.ABORT is finished_of(events).finish_reason
    assert 0 == engine.stats().entries
    assert {asyncio.current_task()} == asyncio.all_tasks()


@pytest.mark.parametrize(
    ("first_streams", "second_streams", "generations"),
    [(True, True, 1), (True, False, 1), (False, False, 1), (False, True, 2)],
)
async def test_a_request_that_streams_joins_only_a_generation_that_does(
    first_streams: bool, second_streams: bool, generations: int
):
    """Text that comes in one delta would be no stream; a request that reads the whole may follow either."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    first = asyncio.create_task(read(engine.stream(make_request("1", stream=first_streams))))
    await inner.waiting.wait()
    second = asyncio.create_task(read(engine.stream(make_request("2", stream=second_streams))))
    await asyncio.sleep(0)
    inner.run_freely()

    responses = await asyncio.gather(first, second)

    assert generations == len(inner.requests)
    assert ["ab", "ab"] == [text_of(each) for each in responses]
    assert (generations == 1) == finished_of(responses[1]).cached
    assert (0, 0) == (engine.readers, engine.generating)
    assert 1 == engine.stats().entries


@pytest.mark.parametrize("first_streams", [True, False])
async def test_a_stored_response_serves_requests_that_stream_and_that_do_not(first_streams: bool):
    """A complete response is there at once, in whatever deltas it came."""
    inner = EchoEngine()
    await inner.start()
    engine = CachedEngine(inner, CacheConfig())
    prompt = {"prompt_ids": tuple(map(ord, "hello")), "sampling": SamplingParams(max_tokens=9, logprobs=0)}

    first = await read(engine.stream(make_request("1", stream=first_streams, **prompt)))
    second = await read(engine.stream(make_request("2", stream=not first_streams, **prompt)))

    assert CacheStatus.HIT is started_of(second).cache
    assert deltas_of(first) == deltas_of(second)
    assert finished_of(first).usage == finished_of(second).usage
