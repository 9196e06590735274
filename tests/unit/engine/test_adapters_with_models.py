"""Adapters come with their models: configured ones, those of a model that is replaced, and of one that was evicted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from app.config import AdaptersConfig, ModelConfig
from app.config.adapters import AdapterPreload
from app.engine.adapter_source import AdapterFiles
from app.engine.adapters import AdapterRegistry
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.model_source import LoadSpec
from app.engine.model_states import model_state
from app.engine.served_model import Served, ServedModel
from app.errors import AdapterNotFound, Conflict, EngineNotReady, InvalidRequest, ModelNotFound
from app.ipc.messages import AdapterLoaded
from tests.unit.engine.served import serve
from tests.unit.engine.test_adapter_source import make_adapter
from tests.unit.engine.test_host import hello
from tests.unit.engine.test_model_loader import LoadingEngine, spec
from tests.waiting import until


class AdaptedEngine(LoadingEngine):
    """Takes adapters, whose digests are the names of their folders and a version."""

    def __init__(self, loaded: LoadSpec, workshop: "Workshop") -> None:
        super().__init__(loaded, workshop.errors.get(loaded.name))
        self.workshop = workshop
        self.held: list[str] = []
        self.may_read = workshop.may_read

    async def load_adapter(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        await self.may_read.wait()
        if files.folder in self.workshop.misfits:
            raise InvalidRequest("The adapter cannot be loaded: it belongs to another model.")
        digest = f"{files.folder} {self.workshop.version}"
        self.held.append(digest)
        return AdapterLoaded(1, digest, 4, 1000, None)

    def unload_adapter(self, digest: str) -> None:
        self.held.remove(digest)

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()


class Workshop:
    """Builds engines that take adapters, and remembers them."""

    def __init__(self) -> None:
        self.engines: list[AdaptedEngine] = []
        self.errors: dict[str, Exception] = {}
        self.misfits: set[str] = set()
        """Adapters that fit no model any more."""
        self.version = 1
        """Of the files of all adapters."""
        self.may_read = asyncio.Event()
        self.may_read.set()

    def __call__(self, loaded: LoadSpec) -> Served:
        engine = AdaptedEngine(loaded, self)
        engine.may_serve.set()
        self.engines.append(engine)
        model = serve(loaded.name, engine)
        return ServedModel(name=model.name, engine=engine, chain=model.chain, defaults=model.defaults, adapters=engine)


class Service:
    """A host that has loaded its default model `a`, and can load `b` on its first use."""

    def __init__(self, host: ModelHost, loader: ModelLoader, workshop: Workshop) -> None:
        self.host, self.loader, self.workshop = host, loader, workshop

    @property
    def newest(self) -> AdaptedEngine:
        return self.workshop.engines[-1]

    def served_by(self, adapter: str) -> AdaptedEngine:
        """Return the engine that a request for an adapter reaches."""
        with self.host.lease(hello(model=adapter)) as model:
            engine = model.engine
        assert isinstance(engine, AdaptedEngine)
        return engine

    def refused(self, model: str) -> dict[str, str]:
        return dict(model_state(model, self.host, self.loader).refused_adapters)


@asynccontextmanager
async def service(root: Path, *preload: AdapterPreload, **rules: Any) -> AsyncIterator[Service]:
    for name in ("one", "two"):
        make_adapter(root / name)
    workshop = Workshop()
    registry = AdapterRegistry(AdaptersConfig(roots=(root,), preload=preload), default_model="a")
    host = ModelHost(lambda name: workshop(spec(name)), "a", adapters=registry)
    await host.load("a")
    specs = [spec(name) for name in ("a", "b")]
    loader = ModelLoader(host, workshop, ModelConfig(**rules), loaded=specs[:1], configured=specs)
    try:
        yield Service(host, loader, workshop)
    finally:
        await loader.close()
        await host.close()


async def test_a_model_that_is_replaced_keeps_its_adapters(tmp_path: Path):
    """Requests reach them without a gap; what still runs on the old one goes on there."""
    async with service(tmp_path) as it:
        await it.host.load_adapter("mine", "one", None)
        old = it.newest
        with it.host.lease(hello("running", model="mine")):
            it.workshop.may_read.clear()
            replacing = it.loader.replace(spec("a", dtype="float16"))
            await until(lambda: len(it.workshop.engines) == 2)
            assert it.served_by("mine") is old
            it.workshop.may_read.set()
            await replacing.wait()

            assert it.served_by("mine") is it.newest is not old
            assert (["one 1"], False) == (it.newest.held, bool(old.closings))
        await until(lambda: old.closings == 1)
        assert (("mine",), {}) == (it.host.adapter_names, it.refused("a"))


async def test_an_adapter_that_does_not_fit_the_new_model_is_named_and_comes_back_with_the_old_one(tmp_path: Path):
    """The others are served; a model that is put back has all of them."""
    async with service(tmp_path) as it:
        for name, folder in (("mine", "one"), ("other", "two")):
            await it.host.load_adapter(name, folder, None)
        it.workshop.misfits = {"two"}
        await it.loader.replace(spec("a", dtype="float16")).wait()

        assert it.served_by("mine") is it.newest
        assert {"other": "The adapter cannot be loaded: it belongs to another model."} == it.refused("a")
        with pytest.raises(AdapterNotFound, match="GET /status"):
            it.served_by("other")

        it.workshop.misfits = set()
        await it.loader.replace(spec("a")).wait()
        assert it.served_by("other") is it.newest
        assert {} == it.refused("a")


async def test_an_adapter_that_is_unloaded_while_its_model_is_replaced_does_not_come_back(tmp_path: Path):
    """Nor does the memory that it took in the new one."""
    async with service(tmp_path) as it:
        for name, folder in (("mine", "one"), ("other", "two")):
            await it.host.load_adapter(name, folder, None)
        it.workshop.may_read.clear()
        replacing = it.loader.replace(spec("a", dtype="float16"))
        await until(lambda: len(it.workshop.engines) == 2)
        await it.host.adapters.unload("mine")
        it.workshop.may_read.set()
        await replacing.wait()

        assert (("other",), ["two 1"]) == (it.host.adapter_names, it.newest.held)


async def test_an_adapter_that_is_loaded_while_its_model_is_replaced_is_kept(tmp_path: Path):
    async with service(tmp_path) as it:
        await it.host.load_adapter("mine", "one", None)
        it.workshop.may_read.clear()
        replaced = it.newest
        replaced.may_read = asyncio.Event()
        loading = asyncio.create_task(it.host.load_adapter("other", "two", None))
        replacing = it.loader.replace(spec("a", dtype="float16"))
        await until(lambda: len(it.workshop.engines) == 2)
        # First: once the new model serves, what the old one has read is of no use.
        replaced.may_read.set()
        await loading
        it.workshop.may_read.set()
        await replacing.wait()

        assert it.served_by("other") is it.newest


async def test_an_adapter_that_is_read_longer_than_its_model_serves_is_refused(tmp_path: Path):
    """Its name is free then."""
    async with service(tmp_path) as it:
        it.workshop.may_read.clear()
        loading = asyncio.create_task(it.host.load_adapter("other", "two", None))
        await it.loader.replace(spec("a", dtype="float16")).wait()
        it.workshop.may_read.set()
        with pytest.raises(Conflict, match="was replaced or unloaded"):
            await loading

        await it.host.load_adapter("other", "two", None)
        assert it.served_by("other") is it.newest


async def test_other_files_are_not_taken_for_those_that_were_loaded(tmp_path: Path):
    async with service(tmp_path) as it:
        await it.host.load_adapter("mine", "one", None)
        it.workshop.version = 2
        await it.loader.replace(spec("a", dtype="float16")).wait()

        assert "have changed" in it.refused("a")["mine"]
        assert [] == it.newest.held


async def test_a_load_that_fails_leaves_the_adapters_where_they_were(tmp_path: Path):
    async with service(tmp_path) as it:
        await it.host.load_adapter("mine", "one", None)
        old = it.newest
        it.workshop.errors["a"] = Conflict("no")
        with pytest.raises(Conflict):
            await it.loader.replace(spec("a", dtype="float16")).wait()

        assert it.served_by("mine") is old


async def test_configured_adapters_are_loaded_with_their_models(tmp_path: Path):
    """Of the model that the service starts with as soon as it serves, of another one before its first request."""
    preload = (
        AdapterPreload(name="mine", source="one"),
        AdapterPreload(name="its", source=str(tmp_path / "two"), model="b"),
        AdapterPreload(name="lost", source="nowhere"),
    )
    async with service(tmp_path, *preload, first_use="wait") as it:
        with pytest.raises(EngineNotReady, match="is being loaded"):
            it.served_by("mine")
        await it.host.load_adapters()
        assert it.served_by("mine") is it.newest
        assert {"lost": "source names no folder"} == it.refused("a")

        with pytest.raises(EngineNotReady):
            it.served_by("its")
        await it.loader.ensure("its")
        assert it.served_by("its") is it.newest
        assert ("mine", "its") == it.host.adapter_names


async def test_a_key_that_may_use_an_adapter_only_has_its_model_loaded(tmp_path: Path):
    preload = AdapterPreload(name="its", source="one", model="b")
    async with service(tmp_path, preload, first_use="wait") as it:
        await it.loader.ensure("its", allowed=("other",))
        assert ["a"] == [*it.host.loaded]
        await it.loader.ensure("its", allowed=("its",))
        assert ["a", "b"] == [*it.host.loaded]


async def test_a_model_that_was_evicted_comes_back_with_its_adapters(tmp_path: Path):
    async with service(tmp_path, max_loaded=2, first_use="wait") as it:
        await it.loader.load(spec("b")).wait()
        await it.host.load_adapter("its", "one", "b")
        await it.loader.load(spec("c")).wait()
        assert ["a", "c"] == [*it.host.loaded]
        assert () == it.host.adapter_names

        await it.loader.ensure("its")
        assert it.served_by("its") is it.newest


async def test_a_model_that_was_unloaded_has_only_its_configured_adapters_again(tmp_path: Path):
    preload = AdapterPreload(name="its", source="one", model="b")
    async with service(tmp_path, preload) as it:
        await it.loader.load(spec("b")).wait()
        await it.host.load_adapter("more", "two", "b")
        await it.loader.unload("b")
        with pytest.raises(ModelNotFound):
            it.served_by("its")

        await it.loader.load(spec("b")).wait()
        assert ("its",) == it.host.adapter_names


async def test_no_more_adapters_come_with_a_model_than_may_be_loaded(tmp_path: Path):
    async with service(tmp_path, max_loaded=2, first_use="wait") as it:
        it.host.adapters.config = replace_most(it.host.adapters.config, 1)
        await it.loader.load(spec("b")).wait()
        await it.host.load_adapter("its", "one", "b")
        await it.loader.load(spec("c")).wait()
        await it.host.load_adapter("mine", "two", None)
        await it.loader.ensure("b")

        assert {"its": "As many adapters are loaded as may be (adapters.max_loaded)."} == it.refused("b")
        assert ("mine",) == it.host.adapter_names


def replace_most(config: AdaptersConfig, most: int) -> AdaptersConfig:
    return config.model_copy(update={"max_loaded": most})


async def test_an_adapter_gets_no_name_of_a_model_that_is_not_loaded_yet(tmp_path: Path):
    async with service(tmp_path) as it:
        with pytest.raises(Conflict, match="A model has this name"):
            await it.host.load_adapter("b", "one", None)
