"""Adapters by name: loaded once, leased by requests, loaded again by a new worker, and gone after an unload."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.config import AdaptersConfig
from app.engine.adapter_source import find_adapter_files
from app.engine.adapters import AdapterRegistry
from app.engine.cache import cache_key
from app.engine.echo import EchoEngine
from app.engine.host import ModelHost
from app.engine.local import LocalEngine
from app.engine.served_model import ServedModel
from app.errors import (
    AdapterNotFound,
    Conflict,
    EngineFailed,
    EngineNotReady,
    InvalidRequest,
    ModelNotFound,
)
from app.events import Event
from app.ipc.messages import AdapterFailed, AdapterLoaded, LoadAdapter, Submit, ToWorker, UnloadAdapter
from app.requests import GenerationRequest
from app.types import FinishReason
from tests.unit.engine.fake_worker import TOKENIZER, FakeLink, FakeWorkers, engine_on, make_request
from tests.unit.engine.served import serve
from tests.unit.engine.test_adapter_source import make_adapter
from tests.unit.event_streams import finished_of
from tests.unit.tiny_models import save
from tests.waiting import until


class AdapterLink(FakeLink):
    """A worker that loads adapters: the digest of one is the name of its folder."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: str | None = None
        self.answers = True

    def send(self, message: ToWorker) -> None:
        super().send(message)
        if not isinstance(message, LoadAdapter) or not self.answers:
            return
        if self.refuses:
            self.say(AdapterFailed(message.id, self.refuses))
        else:
            self.say(AdapterLoaded(message.id, Path(message.weights_file).parent.name, 4, 1000, None))

    def received(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    @property
    def unloaded(self) -> list[str]:
        return [message.digest for message in self.received(UnloadAdapter)]


class AdapterWorkers(FakeWorkers):
    refuses: str | None = None

    async def __call__(self) -> AdapterLink:
        link = AdapterLink()
        link.refuses = self.refuses
        self.links.append(link)
        if self.ready:
            link.say(self.message)
        return link

    @property
    def link(self) -> AdapterLink:
        assert isinstance(self.newest, AdapterLink)
        return self.newest


@dataclass
class Hosted:
    """A host with one model that takes adapters, `base`."""

    host: ModelHost
    engine: LocalEngine
    workers: AdapterWorkers

    @property
    def registry(self) -> AdapterRegistry:
        return self.host.adapters

    async def load(self, name: str, source: str | None = None) -> None:
        await self.host.load_adapter(name, source or name, None)

    async def read(self, request: GenerationRequest) -> list[Event]:
        """Run a request as the service does."""
        with self.host.lease(request) as model:
            return [event async for event in model.engine.stream(self.registry.resolve(request))]

    async def begin(self, request: GenerationRequest) -> "asyncio.Task[list[Event]]":
        link, before = self.workers.link, len(self.workers.link.open)
        task = asyncio.create_task(self.read(request))
        await until(lambda: len(link.open) > before or task.done())
        return task


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def hosted(tokenizer: Path, root: Path, **config: Any) -> AsyncIterator[Hosted]:
    workers = AdapterWorkers(tokenizer, slots=8)
    async with engine_on(workers) as engine:

        def build(name: str) -> ServedModel:
            if name not in ("base", "other"):
                raise ModelNotFound("There is no such model.")
            return structs_replaced(serve(name, engine), engine if name == "base" else None)

        registry = AdapterRegistry(AdaptersConfig(roots=(root,), **config))
        host = ModelHost(build, "base", adapters=registry)
        for name in ("base", "other"):
            await host.load(name)
        for folder in ("a", "b", "c"):
            make_adapter(root / folder)
        yield Hosted(host, engine, workers)


def structs_replaced(model: ServedModel, engine: LocalEngine | None) -> ServedModel:
    return ServedModel(
        name=model.name, engine=model.engine, chain=model.chain, defaults=model.defaults, adapters=engine
    )


def named(name: str, **fields: Any) -> GenerationRequest:
    return structs.replace(make_request(name), **fields)


async def test_a_request_reaches_the_worker_with_the_digest_of_the_adapter_that_it_names(tokenizer, tmp_path):
    """As its model, as its adapter, or as both; one of the base model has none."""
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        requests = [
            named("1", model="mine"),
            named("2", adapter="mine"),
            named("3", adapter="mine", model="base"),
            named("4", adapter="mine", model="mine"),
            named("5", model="base"),
            named("6"),
        ]
        tasks = [await it.begin(request) for request in requests]
        for number in list(it.workers.link.open):
            it.workers.link.event(number, 1, finish="length")
        await asyncio.gather(*tasks)

        assert ["a"] * 4 + [None] * 2 == [each.adapter for each in it.workers.link.received(Submit)]
        assert it.host.adapter_names == ("mine",)


async def test_two_loads_of_one_name_never_share_a_cached_response(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        keys = []
        for source in ("a", "b", "a"):
            await it.load("mine", source)
            resolved = it.registry.resolve(named("1", model="mine"))
            keys.append(cache_key(resolved, it.engine.info, ""))
            await it.registry.unload("mine")
        keys.append(cache_key(named("1"), it.engine.info, ""))

        assert keys[0] == keys[2]
        assert len(set(keys)) == 3


async def test_what_cannot_be_named_is_refused(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        with pytest.raises(AdapterNotFound):
            await it.read(named("1", adapter="theirs"))
        with pytest.raises(ModelNotFound, match="base, other, mine"):
            await it.read(named("1", model="theirs"))
        with pytest.raises(InvalidRequest, match="another model"):
            await it.read(named("1", adapter="mine", model="other"))
        with pytest.raises(InvalidRequest, match="names an adapter"):
            it.host.find_embedding("mine")


async def test_a_load_that_cannot_be_is_refused_and_leaves_the_name_free(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path, max_loaded=2) as it:
        it.workers.link.refuses = "adapter_config.json: use_dora is not supported"
        with pytest.raises(InvalidRequest, match=r"cannot be loaded: .*use_dora"):
            await it.load("mine", "a")
        it.workers.link.refuses = None
        with pytest.raises(InvalidRequest, match=r"\.\."):
            await it.load("mine", "../a")
        with pytest.raises(InvalidRequest, match="takes no adapters"):
            await it.host.load_adapter("mine", "a", "other")
        with pytest.raises(Conflict, match="A model has this name"):
            await it.load("other", "a")
        await it.load("mine", "a")
        with pytest.raises(Conflict, match="loaded already"):
            await it.load("mine", "b")
        await it.load("second", "b")
        with pytest.raises(Conflict, match="max_loaded"):
            await it.load("third", "c")

        assert it.host.adapter_names == ("mine", "second")


async def test_the_same_files_under_two_names_are_in_memory_until_both_are_gone(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("one", "a")
        await it.load("two", "a")
        await it.registry.unload("one")
        assert not it.workers.link.received(UnloadAdapter)
        await it.registry.unload("two")

        assert ["a"] == it.workers.link.unloaded
        with pytest.raises(AdapterNotFound):
            await it.registry.unload("two")


async def test_an_unload_refuses_new_requests_and_lets_the_live_ones_finish(tokenizer, tmp_path):
    """The weights go once the last of them has ended."""
    async with hosted(tokenizer, tmp_path, grace_seconds=10) as it:
        await it.load("mine", "a")
        task = await it.begin(named("1", model="mine"))
        unloading = asyncio.create_task(it.registry.unload("mine"))
        await asyncio.sleep(0.01)
        with pytest.raises(ModelNotFound):
            await it.read(named("2", model="mine"))
        assert not it.workers.link.received(UnloadAdapter)

        it.workers.link.event(it.workers.link.open[0], 1, finish="length")

        assert FinishReason.LENGTH is finished_of(await task).finish_reason
        await unloading
        assert ["a"] == it.workers.link.unloaded


async def test_after_the_grace_live_requests_end_with_a_final_event(tokenizer, tmp_path):
    """Those of others go on."""
    async with hosted(tokenizer, tmp_path, grace_seconds=0) as it:
        await it.load("mine", "a")
        task, other = await it.begin(named("1", model="mine")), await it.begin(named("2"))
        await it.registry.unload("mine")

        assert FinishReason.ABORT is finished_of(await task).finish_reason
        assert not other.done()
        assert ["a"] == it.workers.link.unloaded
        it.workers.link.event(it.workers.link.open[-1], 1, finish="length")
        assert FinishReason.LENGTH is finished_of(await other).finish_reason


async def test_a_new_worker_loads_the_adapters_again_before_it_gets_requests(tokenizer, tmp_path):
    """Those that are still loaded, and only if their files are the same."""
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("one", "a")
        await it.load("two", "b")
        await it.registry.unload("two")
        it.workers.newest.kill()
        await until(lambda: len(it.workers.links) == 2)
        await it.engine.wait_ready()
        task = await it.begin(named("1", model="one"))

        heard = [message for message in it.workers.link.heard if isinstance(message, LoadAdapter | Submit)]
        assert [("LoadAdapter", "a"), ("Submit", "a")] == [
            (type(each).__name__, each.digest if isinstance(each, LoadAdapter) else each.adapter) for each in heard
        ]
        it.workers.link.event(it.workers.link.open[0], 1, finish="length")
        await task


async def test_an_adapter_that_a_new_worker_cannot_load_fails_its_requests_until_it_is_loaded(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        it.workers.refuses = "its files have changed since it was loaded"
        it.workers.newest.kill()
        await until(lambda: len(it.workers.links) == 2)
        await it.engine.wait_ready()
        await asyncio.sleep(0.01)
        with pytest.raises(EngineFailed, match="load it again"):
            await it.read(named("1", model="mine"))

        it.workers.link.refuses = None
        await it.registry.unload("mine")
        await it.load("mine", "a")
        task = await it.begin(named("2", model="mine"))
        it.workers.link.event(it.workers.link.open[0], 1, finish="length")
        assert FinishReason.LENGTH is finished_of(await task).finish_reason


async def test_a_worker_that_dies_while_it_loads_an_adapter_fails_the_load(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        it.workers.link.answers = False
        loading = asyncio.create_task(it.load("mine", "a"))
        await until(lambda: bool(it.workers.link.received(LoadAdapter)))
        it.workers.ready = False
        it.workers.newest.kill()
        with pytest.raises(EngineFailed, match="while it loaded"):
            await loading
        with pytest.raises(EngineNotReady):
            await it.load("mine", "a")

        assert it.host.adapter_names == ()


async def test_whoever_stops_waiting_for_a_load_leaves_nothing_behind(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        link = it.workers.link
        link.answers = False
        loading = asyncio.create_task(it.load("mine", "a"))
        await until(lambda: bool(link.received(LoadAdapter)))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
        link.say(AdapterLoaded(link.received(LoadAdapter)[0].id, "a", 4, 1000, None))
        await until(lambda: bool(link.received(UnloadAdapter)))

        link.answers = True
        await it.load("mine", "a")
        assert it.host.adapter_names == ("mine",)


async def test_a_load_that_is_tried_again_outlives_the_first_one(tokenizer, tmp_path):
    """Both are answered before the worker hears that nobody waits for the first: it is told of no later load."""
    async with hosted(tokenizer, tmp_path) as it:
        link = it.workers.link
        link.answers = False
        first = asyncio.create_task(it.load("mine", "a"))
        await until(lambda: bool(link.received(LoadAdapter)))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        second = asyncio.create_task(it.load("mine", "a"))
        await until(lambda: len(link.received(LoadAdapter)) == 2)
        loads = [message.id for message in link.received(LoadAdapter)]
        for number in loads:
            link.say(AdapterLoaded(number, "a", 4, 1000, None))
        await second
        await until(lambda: bool(link.unloaded))

        assert [UnloadAdapter("a", loads[0])] == link.received(UnloadAdapter)
        await it.registry.unload("mine")
        assert UnloadAdapter("a", loads[1]) == link.received(UnloadAdapter)[-1]


async def test_a_load_that_is_cancelled_as_its_answer_comes_leaves_nothing_behind(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        link = it.workers.link
        files = find_adapter_files("a", (tmp_path,))
        link.answers = False
        loading = asyncio.create_task(it.engine.load_adapter(files, 8))
        await until(lambda: bool(link.received(LoadAdapter)))
        it.engine.on_adapter(AdapterLoaded(link.received(LoadAdapter)[0].id, "a", 4, 1000, None))
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)

        assert loading.cancelled()
        assert ["a"] == link.unloaded


async def test_an_adapters_name_unloads_no_model(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        with pytest.raises(ModelNotFound):
            await it.host.unload("mine", 0)

        assert it.host.loaded == ("base", "other")


async def test_the_adapters_of_a_model_go_with_it(tokenizer, tmp_path):
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        await it.host.unload("base", 0)

        assert (it.host.adapter_names, it.registry.adapters) == ((), ())
        with pytest.raises(ModelNotFound):
            await it.read(named("1", model="mine"))


async def test_no_model_gets_the_name_of_an_adapter(tokenizer, tmp_path):
    """Its requests would reach the adapter."""
    async with hosted(tokenizer, tmp_path) as it:
        await it.load("mine", "a")
        with pytest.raises(Conflict, match="adapter"):
            it.host.put(structs_replaced(serve("mine", EchoEngine()), None))
