"""Models are loaded once, leased by requests, drained, and unloaded."""

import asyncio
from collections import Counter
from contextlib import ExitStack

import pytest

from app.embeddings import EmbeddingRequest
from app.engine.echo import EchoEngine
from app.engine.host import ModelHost
from app.engine.served_model import Served, ServedEncoder, ServedModel
from app.errors import EngineFailed, InvalidRequest, ModelNotFound, ShuttingDown
from app.events import Event
from app.langchain.embeddings import EngineEmbeddings
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason, Tenant
from tests.unit.engine.scripted import make_request
from tests.unit.engine.served import serve
from tests.unit.event_streams import finished_of, read, text_of
from tests.waiting import HANG_SECONDS
from tests.web.word_encoder import WordEncoder

SOON = HANG_SECONDS
"""Seconds in which something that has nothing to wait for has happened, on a busy machine too."""


class CountingEngine(EchoEngine):
    """Echoes its prompt, counts its starts and closings, and may fail to start or take its time to close."""

    def __init__(self, *, start_error: Exception | None = None, token_delay_seconds: float = 0) -> None:
        super().__init__(token_delay_seconds=token_delay_seconds)
        self.start_error = start_error
        self.starts = self.closings = 0
        self.may_start, self.may_close = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.may_close.set()

    async def start(self) -> None:
        self.starts += 1
        await asyncio.sleep(0)
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        await super().start()

    async def close(self) -> None:
        await super().close()
        await self.may_close.wait()
        self.closings += 1


class Builder:
    """Builds models of any name but `unknown`, and records them."""

    def __init__(self, *, token_delay_seconds: float = 0) -> None:
        self.token_delay_seconds = token_delay_seconds
        self.start_error: Exception | None = None
        self.engines: dict[str, list[CountingEngine]] = {}

    def __call__(self, name: str) -> ServedModel:
        if name == "unknown":
            raise ModelNotFound("There is no such model.")
        engine = CountingEngine(start_error=self.start_error, token_delay_seconds=self.token_delay_seconds)
        self.engines.setdefault(name, []).append(engine)
        return serve(name, engine)

    @property
    def built(self) -> Counter[str]:
        return Counter({name: len(engines) for name, engines in self.engines.items()})


async def host_of(builder: Builder, *names: str) -> ModelHost:
    """Return a host that has loaded these models, the first as the default one."""
    host = ModelHost(builder, names[0])
    for name in names:
        await host.load(name)
    return host


def hello(request_id: str = "a", model: str | None = None, n: int = 1) -> GenerationRequest:
    return make_request(request_id, prompt_ids=tuple(map(ord, "hello")), model=model, n=n)


async def generate(host: ModelHost, request: GenerationRequest) -> list[list[Event]]:
    """Lease the model of a request and read all its samples."""
    with host.lease(request) as model:
        return await asyncio.gather(*(read(model.engine.stream(sample)) for sample in request.samples()))


async def begin(host: ModelHost, request: GenerationRequest) -> asyncio.Task[list[list[Event]]]:
    """Start to generate, and return once the engine runs all samples."""
    task = asyncio.create_task(generate(host, request))
    async with asyncio.timeout(SOON):
        while host.find(request.model).engine.status().running < request.n:  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0)
    return task


async def test_ten_loads_at_once_load_a_model_once() -> None:
    """All get the same one, which was built and started once."""
    builder = Builder()
    host = ModelHost(builder, "echo")

    models = await asyncio.gather(*(host.load("echo") for _ in range(10)))

    assert Counter(echo=1) == builder.built
    assert 1 == builder.engines["echo"][0].starts
    assert 1 == len({id(model) for model in models})
    assert ("echo",) == host.names


async def test_a_model_that_cannot_be_built_is_not_loaded() -> None:
    """The builder's error is the caller's, and others can still be loaded."""
    host = await host_of(Builder(), "echo")

    with pytest.raises(ModelNotFound, match="no such model"):
        await host.load("unknown")

    assert ("echo",) == host.names


async def test_a_start_that_fails_leaves_nothing() -> None:
    """The model is not there, its engine is closed, and the next load begins anew."""
    builder = Builder()
    builder.start_error = EngineFailed("No memory.")
    host = ModelHost(builder, "echo")

    with pytest.raises(EngineFailed, match="No memory"):
        await host.load("echo")
    after_failure = host.names
    builder.start_error = None
    await host.load("echo")

    assert () == after_failure
    assert (1, EngineState.CLOSED) == (builder.engines["echo"][0].closings, builder.engines["echo"][0].status().state)
    assert Counter(echo=2) == builder.built
    assert "hello" == text_of((await generate(host, hello()))[0])


async def test_a_request_gets_the_model_that_it_names() -> None:
    """Of several that are loaded; the default one where it names none."""
    host = await host_of(Builder(), "echo", "first", "second")

    served = []
    for name in ("second", None, "first", "echo"):
        with host.lease(hello(model=name)) as model:
            served.append(model.name)

    assert ["second", "echo", "first", "echo"] == served
    assert ("echo", "first", "second") == host.names == tuple(model.name for model in host.models)
    assert host.default is host.find("echo") is host.find(None)


async def test_a_model_that_is_not_loaded_is_not_found() -> None:
    """It raises before any work; so does the default one before it is loaded."""
    host = await host_of(Builder(), "echo")

    with pytest.raises(ModelNotFound):
        await generate(host, hello(model="other"))
    with pytest.raises(ModelNotFound):
        await host.unload("other", grace_seconds=0)
    with pytest.raises(ModelNotFound):
        await generate(ModelHost(Builder(), "echo"), hello())


async def test_unloading_waits_for_a_lease_and_refuses_new_ones_at_once() -> None:
    """The live request finishes by itself; only then is the engine closed; other models are not concerned."""
    builder = Builder(token_delay_seconds=0.01)
    host = await host_of(builder, "echo", "other")
    live = await begin(host, hello("a", n=2))

    unloading = asyncio.create_task(host.unload("echo", grace_seconds=60))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotFound):
        await generate(host, hello("b"))
    with pytest.raises(ModelNotFound):
        await host.unload("echo", grace_seconds=0)
    closed_early = builder.engines["echo"][0].closings
    other = await generate(host, hello("c", model="other"))
    await asyncio.wait_for(unloading, SOON)

    assert 0 == closed_early
    assert [FinishReason.STOP] * 2 == [finished_of(each).finish_reason for each in await live]
    assert "hello" == text_of(other[0])
    assert 1 == builder.engines["echo"][0].closings
    assert ("other",) == host.names


async def test_unloading_ends_what_is_left_after_the_grace_period() -> None:
    """Every sample ends with ABORT and its text so far; nothing waits for the rest of it."""
    builder = Builder(token_delay_seconds=0.05)
    host = await host_of(builder, "echo", "other")
    live, other = await begin(host, hello("a", n=3)), await begin(host, hello("b", model="other"))

    await asyncio.wait_for(host.unload("echo", grace_seconds=0.01), SOON)

    assert [FinishReason.ABORT] * 3 == [finished_of(each).finish_reason for each in await live]
    assert [FinishReason.STOP] == [finished_of(each).finish_reason for each in await other]


async def test_an_unloaded_name_can_be_loaded_again() -> None:
    """As a new model, though a request of the old one has not let go of its lease yet."""
    builder = Builder()
    host = await host_of(builder, "echo")
    with ExitStack() as leases:
        old = leases.enter_context(host.lease(hello("a")))
        await host.unload("echo", grace_seconds=0)
        new = await host.load("echo")

        assert old is not new
        assert "hello" == text_of((await generate(host, hello("b")))[0])
        leases.enter_context(host.lease(hello("c")))
    await asyncio.wait_for(host.unload("echo", grace_seconds=60), SOON)

    assert Counter(echo=2) == builder.built
    assert [1, 1] == [engine.closings for engine in builder.engines["echo"]]


async def test_a_load_during_an_unload_waits_for_it_and_loads_anew() -> None:
    """Nobody gets a model that is on its way out, and two that wait load one."""
    builder = Builder()
    host = await host_of(builder, "echo")
    builder.engines["echo"][0].may_close.clear()
    unloading = asyncio.create_task(host.unload("echo", grace_seconds=0))
    await asyncio.sleep(0)

    loading = [asyncio.create_task(host.load("echo")) for _ in range(2)]
    await asyncio.sleep(0.01)
    early = [task.done() for task in loading]
    builder.engines["echo"][0].may_close.set()
    await asyncio.wait_for(unloading, SOON)
    models = await asyncio.wait_for(asyncio.gather(*loading), SOON)

    assert [False, False] == early
    assert models[0] is models[1] is host.find("echo")
    assert Counter(echo=2) == builder.built
    assert "hello" == text_of((await generate(host, hello()))[0])


async def test_a_start_that_fails_during_an_unload_leaves_the_next_model_alone() -> None:
    """The unload is not over before its engine has closed, and it takes no model away that was loaded after it."""
    builder = Builder()
    host = ModelHost(builder, "echo")
    first = asyncio.create_task(host.load("echo"))
    await asyncio.sleep(0)
    (engine,) = builder.engines["echo"]
    engine.may_start.clear()
    engine.may_close.clear()
    unloading = asyncio.create_task(host.unload("echo", grace_seconds=0))
    await asyncio.sleep(0)
    second = asyncio.create_task(host.load("echo"))
    engine.start_error = EngineFailed("Closed while it started.")
    engine.may_start.set()
    await asyncio.sleep(0.01)
    early = second.done()
    engine.may_close.set()

    await asyncio.wait_for(unloading, SOON)
    with pytest.raises(EngineFailed):
        await first
    assert not early
    assert await second is host.find("echo")
    assert "hello" == text_of((await generate(host, hello()))[0])


async def test_a_lease_ends_however_its_request_does() -> None:
    """By an error or a hang-up too: unloading has nothing left to wait for."""
    builder = Builder(token_delay_seconds=60)
    host = await host_of(builder, "echo")
    with pytest.raises(EngineFailed), host.lease(hello("a", n=2)):
        raise EngineFailed("It failed.")
    live = await begin(host, hello("b"))
    live.cancel()
    await asyncio.wait([live])

    await asyncio.wait_for(host.unload("echo", grace_seconds=60), SOON)

    assert live.cancelled()


async def test_draining_lets_live_requests_finish_and_refuses_new_ones() -> None:
    """The drain returns when the last live request of all models has ended by itself."""
    host = await host_of(Builder(token_delay_seconds=0.01), "echo", "other")
    live = [await begin(host, hello("a")), await begin(host, hello("b", model="other"))]

    drain = asyncio.create_task(host.drain(grace_seconds=60))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await generate(host, hello("c"))
    with pytest.raises(ShuttingDown):
        await host.load("third")
    await asyncio.wait_for(drain, SOON)

    assert all(task.done() for task in live)
    assert [FinishReason.STOP] * 2 == [finished_of((await task)[0]).finish_reason for task in live]
    assert not host.over


async def test_after_the_grace_period_live_requests_end_with_abort() -> None:
    """What is left of any model is ended with a last event, not cut, and nothing starts any more."""
    host = await host_of(Builder(token_delay_seconds=0.05), "echo", "other")
    live = [await begin(host, hello("a", n=2)), await begin(host, hello("b", model="other"))]

    await host.drain(grace_seconds=0.01)

    ends = [finished_of(events).finish_reason for task in live for events in await task]
    assert [FinishReason.ABORT] * 3 == ends
    assert host.over


async def test_aborting_all_ends_a_drain_and_an_unload_that_wait() -> None:
    """A second signal does not wait for the grace period of the first."""
    host = await host_of(Builder(token_delay_seconds=60), "echo", "other")
    live = [await begin(host, hello("a")), await begin(host, hello("b", model="other"))]
    waiting = [
        asyncio.create_task(host.unload("other", grace_seconds=60)),
        asyncio.create_task(host.drain(grace_seconds=60)),
    ]
    await asyncio.sleep(0)

    await host.abort_all()
    await asyncio.wait_for(asyncio.gather(*waiting), SOON)
    for task in live:
        task.cancel()
    await asyncio.wait(live)

    assert host.draining
    assert host.over
    assert ("echo",) == host.names


async def test_closing_stops_every_engine() -> None:
    """Live requests end with ABORT, and no new one is taken."""
    builder = Builder(token_delay_seconds=0.05)
    host = await host_of(builder, "echo", "other")
    live = await begin(host, hello("a"))

    await host.close()

    assert FinishReason.ABORT is finished_of((await live)[0]).finish_reason
    assert [1, 1] == [engines[0].closings for engines in builder.engines.values()]
    with pytest.raises(ShuttingDown):
        await generate(host, hello("b"))


def encoder(name: str) -> ServedEncoder:
    engine = WordEncoder(name)
    return ServedEncoder(name=name, engine=engine, embeddings=EngineEmbeddings(embedder=engine, model=name))


async def test_models_that_only_embed_are_hosted_beside_those_that_generate():
    """Each is found for its own task only; one that embeds is never the default of a chat."""
    served: dict[str, Served] = {"chat": serve("chat", EchoEngine()), "enc": encoder("enc")}
    host = ModelHost(served.__getitem__, "chat")
    for name in ("enc", "chat"):
        await host.load(name)

    assert ("chat", "enc") == host.names
    assert "chat" == host.find_generating(None).name
    assert "enc" == host.find_embedding(None)[0].name
    with pytest.raises(InvalidRequest, match="only embeds texts; send it to /v1/embeddings"):
        host.find_generating("enc")
    with pytest.raises(InvalidRequest, match="does not embed texts; these do: enc"):
        host.find_embedding("chat")
    with pytest.raises(ModelNotFound):
        host.find_embedding("absent")
    await host.unload("enc", 1)
    with pytest.raises(InvalidRequest, match="no model of this service does"):
        host.find_embedding(None)
    await host.close()


async def test_a_leased_encoder_is_unloaded_once_its_request_has_ended():
    host = ModelHost(encoder, "enc")
    await host.load("enc")
    request = EmbeddingRequest(id="one", tenant=Tenant.program(), inputs=("a",))
    with host.lease_embedding(request) as (model, _):
        assert "enc" == model.name
        unloading = asyncio.create_task(host.unload("enc", 60))
        await asyncio.sleep(0.01)
        assert not unloading.done()
    async with asyncio.timeout(SOON):
        await unloading
    assert () == host.names
