"""An engine on a thread of its own: used from any loop, closed with what stands for it."""

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from app.engine.echo import EchoEngine
from app.errors import EngineFailed, InvalidRequest
from app.events import Delta, Event, Started
from app.langchain.engine_thread import CLOSED, EngineThread, ThreadedEngine
from app.langchain.models import EngineChat, EnginePipeline
from app.requests import GenerationRequest
from tests.unit.engine.scripted import ScriptedEngine, make_request
from tests.waiting import HANG_SECONDS


def pipeline_of(engine: EchoEngine) -> EnginePipeline:
    threaded = ThreadedEngine(engine, "echo")
    return EnginePipeline(engine=threaded, loop=threaded.loop, model_id="echo")


def threads() -> int:
    return sum(thread.name == "echo" for thread in threading.enumerate())


@pytest.fixture
def pipeline() -> Iterator[EnginePipeline]:
    with pipeline_of(EchoEngine()) as pipeline:
        yield pipeline


def test_sync_methods_work_without_any_loop(pipeline: EnginePipeline):
    """A plain script: whole, streamed and as a batch."""
    chat = EngineChat(llm=pipeline)

    assert "hi" == chat.invoke("hi").content
    assert "hi" == "".join(str(chunk.content) for chunk in chat.stream("hi"))
    assert ["a", "b"] == pipeline.batch(["a", "b"])


def test_async_methods_work_on_one_loop_after_the_other(pipeline: EnginePipeline):
    """As `asyncio.run` makes them; and many calls at once on one."""

    async def run(text: str) -> tuple[str, str, list[str]]:
        streamed = "".join([part async for part in pipeline.astream(text)])
        return await pipeline.ainvoke(text), streamed, await pipeline.abatch([text, text])

    assert ("one", "one", ["one", "one"]) == asyncio.run(run("one"))
    assert ("two", "two", ["two", "two"]) == asyncio.run(run("two"))


async def test_sync_methods_work_within_a_running_loop(pipeline: EnginePipeline):
    """As in the cell of a notebook."""
    assert "hi" == pipeline.invoke("hi")
    assert "hi" == "".join(pipeline.stream("hi"))


class Interrupted(EchoEngine):
    """Has this process interrupted, as by Ctrl-C, in the middle of a completion that never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        try:
            yield Started()
            yield Delta(text="a", tokens=1)
            ident = threading.main_thread().ident
            assert ident is not None
            await asyncio.sleep(0.5)  # until the program waits for it
            signal.pthread_kill(ident, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            # A clean-up that takes its time.
            await asyncio.sleep(0.05)
            self.closed.set()


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_interrupted_call_ends_in_the_engine_too(is_chat: bool, is_streamed: bool):
    """And the interruption itself is what the program gets to see."""
    engine = Interrupted()
    with pipeline_of(engine) as pipeline:
        model: Any = EngineChat(llm=pipeline) if is_chat else pipeline
        with pytest.raises(KeyboardInterrupt):
            list(model.stream("hi")) if is_streamed else model.invoke("hi")

        assert engine.closed.wait(HANG_SECONDS)


def test_a_model_that_is_closed_while_it_is_loaded_keeps_nobody_waiting():
    """As where a program ends, which closes all models, and another thread still loads one."""
    begun = threading.Event()

    class Loading(EchoEngine):
        async def wait_ready(self) -> None:
            begun.set()
            await asyncio.Event().wait()

    thread, errors = EngineThread(Loading(), "echo"), list[str]()

    def load() -> None:
        try:
            thread.start()
        except RuntimeError as error:
            errors.append(str(error))

    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    assert begun.wait(HANG_SECONDS)
    thread.stop()
    loading.join(HANG_SECONDS)

    assert [CLOSED] == errors
    assert 0 == threads()


async def test_leaving_a_stream_early_closes_the_engines_before_it_returns():
    """Also when the task that reads it is cancelled while it waits."""
    engine = ScriptedEngine("a", "b", "c")
    with pipeline_of(engine) as pipeline:
        engine.step()
        left: Any = pipeline.engine.stream(make_request("left"))
        await anext(left), await anext(left)
        await left.aclose()
        assert ["left"] == engine.closed

        async def read() -> None:
            async for _ in pipeline.engine.stream(make_request("cancelled")):
                pass

        engine.waiting.clear()
        task = asyncio.create_task(read())
        # The event is of the engine's loop.
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(engine.waiting.wait(), pipeline.engine.loop))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (["left", "cancelled"], []) == (engine.closed, engine.live)


async def test_an_error_of_the_engine_is_raised_where_the_stream_is_read():
    engine = ScriptedEngine("a", error=InvalidRequest("no")).run_freely()

    with pipeline_of(engine) as pipeline:
        with pytest.raises(InvalidRequest, match="no"):
            await pipeline.ainvoke("hi")
        with pytest.raises(InvalidRequest, match="no"):
            pipeline.invoke("hi")


async def test_a_closed_model_says_so():
    """To sync and async calls, and to a stream that is still read; closing it again does nothing."""
    engine = ScriptedEngine("a", "b")
    pipeline = pipeline_of(engine)
    engine.step()
    stream: Any = pipeline.engine.stream(make_request("live"))
    await anext(stream), await anext(stream)

    await pipeline.aclose()
    pipeline.close()

    with pytest.raises(RuntimeError, match="closed"):
        await anext(stream)
    with pytest.raises(RuntimeError, match="closed"):
        await pipeline.ainvoke("hi")
    with pytest.raises(RuntimeError, match="closed"):
        pipeline.invoke("hi")
    with pytest.raises(RuntimeError, match="closed"):
        list(pipeline.stream("hi"))
    assert 0 == threads()


def test_a_model_that_nobody_holds_closes():
    """The thread ends with the last object that has a use for it."""
    chat = EngineChat(llm=pipeline_of(EchoEngine()))
    bound = chat.bind(max_tokens=3)
    del chat
    gc.collect()
    assert "hel" == bound.invoke("hello").content
    assert 1 == threads()

    (thread,) = (thread for thread in threading.enumerate() if thread.name == "echo")
    del bound
    gc.collect()
    thread.join(10)

    assert 0 == threads()


def test_a_model_that_cannot_be_loaded_raises_where_it_is_made_and_leaves_nothing():
    class Broken(EchoEngine):
        async def wait_ready(self) -> None:
            raise EngineFailed("There is no such file.")

    with pytest.raises(EngineFailed, match="no such file"):
        pipeline_of(Broken())

    assert 0 == threads()


async def test_with_closes_what_the_object_owns_and_nothing_else():
    """An engine that was given to the object belongs to whoever made it."""
    engine = EchoEngine()
    await engine.start()
    async with EngineChat(llm=EnginePipeline(engine=engine, model_id="echo")) as chat:
        await chat.ainvoke("hi")

    assert "hi" == (await chat.ainvoke("hi")).content
    await engine.close()

    async with EngineChat(llm=pipeline_of(EchoEngine())) as own:
        assert "hi" == (await own.ainvoke("hi")).content
    assert 0 == threads()
