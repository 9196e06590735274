"""Closing the stream of a chain closes the engine's, at once and in every way that LangChain may run it."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

from app.engine.echo import EchoTokenizer
from app.errors import EngineFailed
from app.events import Delta, Event, Finished, Started
from app.langchain.chains import ModelChains
from app.langchain.messages import to_langchain
from app.langchain.models import EngineChat, EnginePipeline
from app.requests import GenerationRequest
from app.types import Message, Role
from tests.unit.engine.scripted import ScriptedEngine, make_request
from tests.unit.event_streams import finished_of, read, text_of

TEXTS = ("a", "b", "c")
ALL = len(TEXTS) + 2
"""Events of a whole stream: Started, the deltas, Finished."""
MESSAGES = (Message(Role.USER, "hello"),)
CHAT = make_request("chat", messages=MESSAGES, prompt_ids=EchoTokenizer().encode_chat(MESSAGES))
COMPLETION = make_request("completion", text="hello", prompt_ids=EchoTokenizer().encode_text("hello"))
UNENCODED = make_request("unencoded", text="hello", prompt_ids=None)
REQUESTS = {"chat": CHAT, "completion": COMPLETION, "unencoded completion": UNENCODED}


class Observer(AsyncCallbackHandler):
    """Records the runs that callbacks report."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.failed: list[str] = []
        self.tokens: list[str] = []

    async def on_chain_start(self, serialized: Any, inputs: Any, *, name: str = "", **details: Any) -> None:
        self.started.append("chain")

    async def on_chain_end(self, outputs: Any, **details: Any) -> None:
        self.ended.append("chain")

    async def on_chain_error(self, error: BaseException, **details: Any) -> None:
        self.failed.append("chain")

    async def on_chat_model_start(self, serialized: Any, messages: Any, **details: Any) -> None:
        self.started.append("model")

    async def on_llm_start(self, serialized: Any, prompts: Any, **details: Any) -> None:
        self.started.append("model")

    async def on_llm_new_token(self, token: Any, **details: Any) -> None:
        self.tokens.append(token)

    async def on_llm_end(self, response: LLMResult, **details: Any) -> None:
        self.ended.append("model")

    async def on_llm_error(self, error: BaseException, **details: Any) -> None:
        self.failed.append("model")


Open = Callable[[ScriptedEngine, GenerationRequest, RunnableConfig | None], AsyncIterator[Any]]


def through_the_chains(
    engine: ScriptedEngine, request: GenerationRequest, config: RunnableConfig | None
) -> AsyncIterator[Any]:
    """Run the chain of the request's kind, under `config` as LangChain hands it down to a chain within another."""
    var_child_runnable_config.set(config)
    return ModelChains(engine, "echo", system="sys").stream(request)


def through_the_model(
    engine: ScriptedEngine, request: GenerationRequest, config: RunnableConfig | None
) -> AsyncIterator[Any]:
    """Stream the model itself, with the request bound to it as the chain binds it."""
    pipeline = EnginePipeline(engine=engine, model_id="echo")
    if request.is_chat:
        chat = EngineChat(llm=pipeline)
        return chat.astream([to_langchain(message) for message in request.messages], config, request=request)
    return pipeline.astream(request.text or "", config, request=request)


def through_the_model_unbound(
    engine: ScriptedEngine, request: GenerationRequest, config: RunnableConfig | None
) -> AsyncIterator[Any]:
    """Stream the model as any user of LangChain does, with sampling parameters for arguments."""
    pipeline = EnginePipeline(engine=engine, model_id="echo")
    if request.is_chat:
        return EngineChat(llm=pipeline).astream("hello", config, max_tokens=64)
    return pipeline.astream("hello", config, max_tokens=64)


def event_of(item: Any) -> Event:
    """Return the event that a chunk carries; the chains yield events themselves."""
    return item if isinstance(item, Started | Delta | Finished) else item.event


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """Whatever is closed is closed by its owner."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=[False, True], ids=["unobserved", "observed"])
def observer(request: pytest.FixtureRequest) -> Observer | None:
    return Observer() if request.param else None


def config_of(observer: Observer | None) -> RunnableConfig | None:
    return None if observer is None else {"callbacks": [observer]}


ways = pytest.mark.parametrize("open_", [through_the_chains, through_the_model, through_the_model_unbound])
kinds = pytest.mark.parametrize("kind", REQUESTS)


@ways
@kinds
@pytest.mark.parametrize("count", range(ALL + 1))
async def test_leaving_after_any_event_closes_the_engines_stream(
    open_: Open, kind: str, count: int, observer: Observer | None
) -> None:
    """When `aclose` returns, the engine's generator is closed: nothing is left to a collector or to a later turn."""
    engine = ScriptedEngine(*TEXTS).run_freely()
    stream: Any = open_(engine, fresh(REQUESTS[kind]), config_of(observer))

    events = [event_of(await anext(stream)) for _ in range(count)]
    live_before = len(engine.live)
    await stream.aclose()

    assert [] == engine.live
    assert len(engine.requests) == len(engine.closed) == (1 if count else 0)
    assert (1 if 0 < count < ALL else live_before) == live_before
    assert count == len(events)
    assert {asyncio.current_task()} == asyncio.all_tasks()


@ways
@kinds
@pytest.mark.parametrize("count", [1, 2, ALL])
async def test_leaving_waits_until_the_engine_has_cleaned_up(
    open_: Open, kind: str, count: int, observer: Observer | None
) -> None:
    """However long that takes: whoever has left may rely on the place being free."""
    engine = ScriptedEngine(*TEXTS).run_freely()
    engine.may_clean_up.clear()
    stream: Any = open_(engine, fresh(REQUESTS[kind]), config_of(observer))
    for _ in range(count):
        await anext(stream)

    leaving = asyncio.create_task(stream.aclose())
    await engine.cleaning_up.wait()
    await asyncio.sleep(0.01)
    left_early = leaving.done()
    engine.may_clean_up.set()
    await leaving

    assert not left_early
    assert [] == engine.live
    assert 1 == len(engine.closed)


@ways
@kinds
async def test_being_cancelled_closes_the_engines_stream(open_: Open, kind: str, observer: Observer | None) -> None:
    """In the middle of waiting for a token, when the task has ended."""
    engine = ScriptedEngine("never")
    stream: Any = open_(engine, fresh(REQUESTS[kind]), config_of(observer))

    async def read_all() -> None:
        async with aclosing(stream):
            async for _ in stream:
                pass

    reading = asyncio.create_task(read_all())
    await engine.waiting.wait()
    reading.cancel()
    await asyncio.wait([reading])

    assert reading.cancelled()
    assert [] == engine.live
    assert 1 == len(engine.closed)


@ways
@kinds
async def test_a_stream_that_is_read_to_its_end_carries_every_event(
    open_: Open, kind: str, observer: Observer | None
) -> None:
    """Started, each delta as the engine sent it, Finished; and observers learn of chain, model and tokens."""
    engine = ScriptedEngine(*TEXTS).run_freely()
    stream: Any = open_(engine, fresh(REQUESTS[kind]), config_of(observer))

    events = [event_of(item) async for item in stream]

    assert [Started, *[Delta] * len(TEXTS), Finished] == [type(event) for event in events]
    assert "abc" == text_of(events)
    assert len(TEXTS) == finished_of(events).usage.completion_tokens
    assert [] == engine.live
    if observer is not None:
        runs = ["chain", "model"] if open_ is through_the_chains else ["model"]
        # The template is a run of its own below the chain.
        assert set(runs) == set(observer.started) == set(observer.ended)
        assert 1 == observer.started.count("model") == observer.ended.count("model")
        assert "abc" == "".join(observer.tokens)
        assert [] == observer.failed


@ways
@kinds
@pytest.mark.parametrize("texts", [(), TEXTS], ids=["in place of Started", "in place of Finished"])
async def test_an_error_of_the_engine_passes_as_it_is(
    open_: Open, kind: str, texts: tuple[str, ...], observer: Observer | None
) -> None:
    """Of its own class, and with the stream closed behind it; observers learn of the failure."""
    engine = ScriptedEngine(*texts, error=EngineFailed("The worker died.")).run_freely()
    stream: Any = open_(engine, fresh(REQUESTS[kind]), config_of(observer))

    with pytest.raises(EngineFailed, match="The worker died"):
        _ = [item async for item in stream]

    assert [] == engine.live
    if observer is not None:
        assert "model" in observer.failed
        assert (open_ is through_the_chains) == ("chain" in observer.failed)


async def test_leaving_is_reported_to_observers_as_the_end_of_their_runs() -> None:
    """A run that has started is not left open in a tracer: the chain's ends with an error."""
    engine, observer = ScriptedEngine(*TEXTS).run_freely(), Observer()
    stream: Any = through_the_chains(engine, fresh(CHAT), config_of(observer))
    await anext(stream)

    await stream.aclose()

    assert 1 == observer.failed.count("chain")


async def test_two_streams_of_one_model_are_closed_one_by_one() -> None:
    """Closing one does not touch the other."""
    engine = ScriptedEngine(*TEXTS).run_freely()
    chains = ModelChains(engine, "echo", system="sys")
    first, second = chains.stream(fresh(CHAT, "first")), chains.stream(fresh(CHAT, "second"))
    await anext(first), await anext(second)

    await first.aclose()
    closed = list(engine.closed)

    assert ["first"] == closed
    assert "abc" == text_of(await read(second))
    assert ["first", "second"] == engine.closed


def fresh(request: GenerationRequest, request_id: str | None = None) -> GenerationRequest:
    """Return a request of the same content with a progress of its own."""
    return make_request(
        request_id or request.id, messages=request.messages, text=request.text, prompt_ids=request.prompt_ids
    )
