"""Identical requests that meet share one generation, and it lives exactly as long as somebody reads it."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import pytest

from app.config import CacheConfig
from app.engine.base import Chunk
from app.engine.cache import CachedEngine
from app.errors import EngineBusy, EngineFailed
from app.types import FinishReason, Usage
from tests.unit.engine.scripted import ScriptedEngine, ask, read, text


async def test_fifty_equal_requests_at_once_are_one_generation():
    """All get the whole answer; one made it, the others shared it."""
    inner = ScriptedEngine("a", "b", "c").run_freely()
    engine = CachedEngine(inner, CacheConfig())

    answers = await asyncio.gather(*(read(engine, ask(str(number))) for number in range(50)))

    assert 1 == len(inner.calls)
    assert {"abc"} == {text(answer) for answer in answers}
    assert 49 == sum(answer[-1].cached for answer in answers)
    assert inner.calls[0].id not in {str(number) for number in range(50)}


async def test_a_follower_reads_along_live():
    """Who joins late gets what is there at once, and the rest as it is made."""
    inner = ScriptedEngine("a", "b", "c")
    engine = CachedEngine(inner, CacheConfig())
    leader, follower = engine.stream(ask("1")), engine.stream(ask("2"))
    async with aclosing(leader), aclosing(follower), asyncio.timeout(5):
        await anext(leader)
        inner.step(2)
        leads = [(await anext(leader)).text for _ in range(2)]
        follows = [(await anext(follower)).text for _ in range(3)]
        waiting = asyncio.create_task(anext(follower))
        await asyncio.sleep(0.01)
        early = waiting.done()
        inner.step()
        late = await waiting

    assert ["a", "b"] == leads
    assert ["", "a", "b"] == follows
    assert not early
    assert Chunk(text="c", tokens=1, cached=True) == late


async def test_the_generation_outlives_the_client_that_began_it():
    """The leader leaves; the follower gets the whole answer, and it is stored."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    leader = engine.stream(ask("1"))
    await anext(leader)
    follower = asyncio.create_task(read(engine, ask("2")))
    await asyncio.sleep(0)

    await leader.aclose()
    inner.step(2)
    answer = await asyncio.wait_for(follower, 5)
    replay = await read(engine, ask("3"))

    assert "ab" == text(answer) == text(replay)
    assert FinishReason.STOP is answer[-1].finish_reason
    assert 1 == len(inner.calls)
    assert [] == inner.aborted


async def leave(engine: CachedEngine, reader: AsyncGenerator[Chunk, None], request_id: str) -> None:
    await reader.aclose()


async def abort(engine: CachedEngine, reader: AsyncGenerator[Chunk, None], request_id: str) -> None:
    await engine.abort(request_id)


@pytest.mark.parametrize("go", [leave, abort])
async def test_the_last_reader_to_go_ends_the_generation(
    go: Callable[[CachedEngine, AsyncGenerator[Chunk, None], str], Awaitable[None]],
):
    """It is over when the call returns, nothing is stored, and the next equal request begins a new one."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    readers = {name: engine.stream(ask(name)) for name in ("1", "2")}
    for reader in readers.values():
        await anext(reader)

    await go(engine, readers["1"], "1")
    still_running = list(inner.closed)
    await go(engine, readers["2"], "2")
    closed, aborted = list(inner.closed), list(inner.aborted)
    inner.step(2)
    again = await read(engine, ask("3"))

    assert [] == still_running
    assert [inner.calls[0].id] == closed == aborted
    assert not again[-1].cached
    assert 2 == len(inner.calls)
    for reader in readers.values():
        await reader.aclose()


async def test_who_asks_while_the_last_reader_leaves_gets_a_generation_of_its_own():
    """An answer that is being given up is nobody's any more."""
    inner = ScriptedEngine("a")
    engine = CachedEngine(inner, CacheConfig())
    first = engine.stream(ask("1"))
    await anext(first)
    inner.cleared.clear()
    leaving = asyncio.create_task(first.aclose())
    await inner.clearing.wait()

    coming = asyncio.create_task(read(engine, ask("2")))
    await asyncio.sleep(0)
    inner.step()
    inner.cleared.set()
    answer = await asyncio.wait_for(coming, 5)
    await leaving

    assert FinishReason.STOP is answer[-1].finish_reason
    assert not answer[-1].cached
    assert 2 == len(inner.calls)


async def test_who_asks_while_a_cut_short_answer_ends_gets_a_new_one():
    """Its last chunk is out, but the inner engine still clears up."""
    inner = ScriptedEngine("a", end=FinishReason.ABORT).run_freely()
    engine = CachedEngine(inner, CacheConfig())
    inner.cleared.clear()
    first = engine.stream(ask("1"))
    while (await anext(first)).finish_reason is None:
        pass

    inner.end = FinishReason.STOP
    coming = asyncio.create_task(read(engine, ask("2")))
    await asyncio.sleep(0)
    inner.cleared.set()
    answer = await asyncio.wait_for(coming, 5)
    await first.aclose()

    assert FinishReason.STOP is answer[-1].finish_reason


async def test_the_inner_engine_clears_up_undisturbed():
    """An abort and the closing of the aborted stream end the generation once, and both wait for it."""
    inner = ScriptedEngine("a")
    engine = CachedEngine(inner, CacheConfig())
    stream = engine.stream(ask("1"))
    await anext(stream)
    inner.cleared.clear()

    ending = [asyncio.create_task(engine.abort("1"))]
    await inner.clearing.wait()
    ending.append(asyncio.create_task(stream.aclose()))
    await asyncio.sleep(0.01)
    waited = [task.done() for task in ending]
    inner.cleared.set()
    await asyncio.gather(*ending)

    assert [False, False] == waited
    assert [inner.calls[0].id] == inner.closed


async def test_an_error_after_everybody_left_bothers_nobody():
    """asyncio would print an exception that no one looks at."""
    inner, complaints = ScriptedEngine("a"), []
    engine = CachedEngine(inner, CacheConfig())
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    stream = engine.stream(ask("1"))
    await anext(stream)
    inner.closed = None  # so that clearing up fails

    await stream.aclose()
    await asyncio.sleep(0)
    gc.collect()

    assert [] == complaints


async def test_an_abort_ends_only_its_own_stream():
    """The aborted one ends with what it got, the other goes on."""
    inner = ScriptedEngine("a", "b")
    engine = CachedEngine(inner, CacheConfig())
    first, second = engine.stream(ask("1")), engine.stream(ask("2"))
    await anext(first), await anext(second)
    inner.step()
    await anext(first), await anext(second)

    await engine.abort("1")
    ended = [chunk async for chunk in first]
    inner.step()
    goes_on = [chunk async for chunk in second]

    assert [Chunk(finish_reason=FinishReason.ABORT, usage=Usage(3, 1))] == ended
    assert "b" == text(goes_on)
    assert FinishReason.STOP is goes_on[-1].finish_reason


async def test_a_waiting_reader_hears_of_its_abort_at_once():
    """No token has to come first."""
    inner = ScriptedEngine("never")
    engine = CachedEngine(inner, CacheConfig())
    reading = asyncio.create_task(read(engine, ask("1")))
    await inner.reached.wait()

    await engine.abort("1")
    chunks = await asyncio.wait_for(reading, 1)

    assert FinishReason.ABORT is chunks[-1].finish_reason


async def test_a_replay_can_be_aborted():
    """The same promise for a stored answer."""
    engine = CachedEngine(ScriptedEngine("a", "b").run_freely(), CacheConfig())
    await read(engine, ask("1"))
    replay = engine.stream(ask("2"))
    async with aclosing(replay):
        await anext(replay), await anext(replay)
        await engine.abort("2")
        rest = [chunk async for chunk in replay]

    assert [Chunk(finish_reason=FinishReason.ABORT, usage=Usage(3, 1))] == rest


async def test_a_cancelled_request_frees_the_model():
    """A task that is cancelled while it waits for a token leaves like one that closes its stream."""
    inner = ScriptedEngine("never")
    engine = CachedEngine(inner, CacheConfig())
    reading = asyncio.create_task(read(engine, ask("1")))
    await inner.reached.wait()

    reading.cancel()
    await asyncio.wait([reading])

    assert [inner.calls[0].id] == inner.closed
    assert {} == engine._flights == engine._readers


@pytest.mark.parametrize("pieces", [(), ("a",)])
async def test_an_error_reaches_all_who_joined_and_is_not_stored(pieces: tuple[str, ...]):
    """Before the first chunk or after some text: everyone gets it, and the next request tries again."""
    inner = ScriptedEngine(*pieces, error=EngineFailed("The model's worker died.")).run_freely()
    engine = CachedEngine(inner, CacheConfig())

    outcomes = await asyncio.gather(*(read(engine, ask(str(n))) for n in range(5)), return_exceptions=True)
    inner.error, inner.pieces = None, ("fine",)
    after = await read(engine, ask("after"))

    assert [EngineFailed] * 5 == [type(outcome) for outcome in outcomes]
    assert "fine" == text(after)
    assert 2 == len(inner.calls)


async def test_a_refusal_comes_before_the_first_chunk():
    """A busy engine's error is raised at the first `anext`, and nobody is left on board."""
    engine = CachedEngine(ScriptedEngine(error=EngineBusy("Full.")), CacheConfig())

    with pytest.raises(EngineBusy):
        await anext(engine.stream(ask("1")))
    await asyncio.sleep(0)

    assert {} == engine._flights == engine._readers


async def test_closing_ends_live_streams_and_leaves_no_task():
    """Readers get FinishReason.ABORT, and stored text is gone."""
    inner = ScriptedEngine("a", "b").run_freely()
    engine = CachedEngine(inner, CacheConfig())
    await read(engine, ask("1", tenant="bob"))
    inner.pieces, inner.steps, inner.reached = ("never",), asyncio.Semaphore(0), asyncio.Event()
    reading = asyncio.create_task(read(engine, ask("2")))
    await inner.reached.wait()

    await engine.close()
    chunks = await asyncio.wait_for(reading, 1)

    assert FinishReason.ABORT is chunks[-1].finish_reason
    assert 0 == engine.stats().entries
    assert {asyncio.current_task()} == asyncio.all_tasks()
