"""Models come and go while the service runs: one load a name, nothing left of a failed one, room made by last use."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from app.config import ModelConfig
from app.engine.base import EngineStatus, LoadProgress
from app.engine.host import ModelHost
from app.engine.model_loader import MAX_FAILURES, ModelLoader
from app.engine.model_source import LoadSpec
from app.engine.model_states import model_states
from app.engine.served_model import Served
from app.errors import (
    Conflict,
    EngineBusy,
    EngineFailed,
    EngineNotReady,
    InsufficientMemory,
    InvalidRequest,
    ModelLoadFailed,
    ModelNotFound,
    ShuttingDown,
)
from app.types import EngineState
from tests.unit.engine.served import serve
from tests.unit.engine.test_host import CountingEngine, generate, hello
from tests.unit.event_streams import finished_of
from tests.waiting import START_SECONDS, until


class LoadingEngine(CountingEngine):
    """Is ready when the test says so, or fails with an error."""

    def __init__(self, spec: LoadSpec, error: Exception | None) -> None:
        super().__init__()
        self.spec, self.error = spec, error
        self.may_serve = asyncio.Event()
        self.progress = LoadProgress("weights", 1, 4)

    async def wait_ready(self) -> None:
        await self.may_serve.wait()
        if self.error is not None:
            raise self.error

    def status(self) -> EngineStatus:
        status = super().status()
        if self.may_serve.is_set() or status.state is EngineState.CLOSED:
            return status
        return EngineStatus(EngineState.LOADING, 0, 0, 0, progress=self.progress)


class Workshop:
    """Builds engines and remembers them."""

    def __init__(self) -> None:
        self.engines: list[LoadingEngine] = []
        self.errors: dict[str, Exception] = {}
        self.slow: set[str] = set()

    def __call__(self, spec: LoadSpec) -> Served:
        engine = LoadingEngine(spec, self.errors.get(spec.name))
        if spec.name not in self.slow:
            engine.may_serve.set()
        self.engines.append(engine)
        return serve(spec.name, engine)

    @property
    def open(self) -> list[str]:
        """Return the models whose engine was started and not closed."""
        return [engine.spec.name for engine in self.engines if engine.starts and not engine.closings]


def spec(name: str, **fields: Any) -> LoadSpec:
    return LoadSpec(name=name, config=ModelConfig(name=f"folder/{name}", **fields))


@asynccontextmanager
async def service(*names: str, **rules: Any) -> AsyncIterator[tuple[ModelLoader, ModelHost, Workshop]]:
    """Give a host that has loaded its default model `a`; it can load the models of these names on their first use."""
    workshop = Workshop()
    host = ModelHost(lambda name: workshop(spec(name)), "a")
    await host.load("a")
    specs = [spec(name) for name in ("a", *names)]
    loader = ModelLoader(host, workshop, ModelConfig(**rules), loaded=specs[:1], configured=specs)
    try:
        yield loader, host, workshop
    finally:
        await loader.close()
        await host.close()
    assert [] == workshop.open


async def test_ten_requests_for_a_model_share_one_load():
    async with service() as (loader, host, workshop):
        models = await asyncio.gather(*(loader.load(spec("b")).wait() for _ in range(10)))
        again = await loader.load(spec("b")).wait()

        assert 1 == len({id(model) for model in (*models, again)})
        assert ["a", "b"] == [engine.spec.name for engine in workshop.engines]
        assert ("a", "b") == host.loaded


async def test_another_model_does_not_get_a_name_that_is_taken():
    async with service() as (loader, _host, workshop):
        workshop.slow.add("b")
        loader.load(spec("b"))
        with pytest.raises(Conflict, match="is being loaded"):
            loader.load(spec("b", dtype="float16"))
        with pytest.raises(Conflict, match="is loaded"):
            loader.load(spec("a", dtype="float16"))


async def test_a_model_is_visible_only_once_it_serves():
    async with service() as (loader, host, workshop):
        workshop.slow.add("b")
        load = loader.load(spec("b"))
        await until(lambda: load.engine is not None)
        with pytest.raises(ModelNotFound):
            host.find("b")
        shown = {state.name: (state.state, state.progress) for state in model_states(host, loader)}
        workshop.engines[-1].may_serve.set()
        await load.wait()

        assert ("loading", LoadProgress("weights", 1, 4)) == shown["b"]
        assert "b" == host.find("b").name


async def test_the_progress_of_a_load_is_told_as_it_changes():
    async with service() as (loader, _host, workshop):
        workshop.slow.add("b")
        load = loader.load(spec("b"))
        updates = load.updates()
        seen = [await anext(updates), await anext(updates)]
        workshop.engines[-1].progress = LoadProgress("weights", 2, 4)
        seen.append(await anext(updates))
        workshop.engines[-1].may_serve.set()
        rest = [update async for update in updates]

        assert ["waiting", "weights", "weights"] == [update.stage for update in seen]
        assert [None, 1, 2] == [update.bytes_done for update in seen]
        assert rest in ([], [LoadProgress("ready")])


REASONS = [
    ("no_memory", InsufficientMemory),
    ("gated", ModelLoadFailed),
    ("not_found", ModelLoadFailed),
    ("bad_file", ModelLoadFailed),
    (None, ModelLoadFailed),
]
"""What a worker says, and what it is to the caller; a worker that was killed says nothing."""


@pytest.mark.parametrize(("reason", "kind"), REASONS)
async def test_a_load_that_fails_names_the_reason_and_leaves_nothing(reason: str | None, kind: type[Exception]):
    details = {} if reason is None else {"reason": reason, "needed_bytes": 5}
    async with service() as (loader, host, workshop):
        workshop.errors["b"] = EngineFailed("It cannot be loaded.", details=details)
        with pytest.raises(kind) as failure:
            await loader.load(spec("b")).wait()

        assert isinstance(failure.value, ModelLoadFailed | InsufficientMemory)
        assert {"reason": "failed", **details} == failure.value.details
        assert ["a"] == workshop.open
        assert ("a",) == host.names
        (state,) = [state for state in model_states(host, loader) if state.name == "b"]
        assert ("failed", reason or "failed") == (state.state, state.error_reason)


async def test_a_name_is_gone_when_its_load_failed_and_nothing_else_has_it():
    """Neither a model that serves under it, nor one that a request may have loaded, nor another load."""
    workshop, named, gone = Workshop(), list[str](), list[str]()
    host = ModelHost(lambda name: workshop(spec(name)), "a")
    await host.load("a")
    specs = [spec("a"), spec("known")]
    rules = ModelConfig()
    loader = ModelLoader(
        *(host, workshop, rules), loaded=specs[:1], configured=specs, on_name=named.append, on_name_gone=gone.append
    )
    workshop.errors |= {name: EngineFailed("no") for name in ("a", "known", "b")}
    workshop.slow.add("ended")
    with suppress(ModelLoadFailed):
        await loader.replace(spec("a")).wait()
    for name in ("known", "b"):
        with suppress(ModelLoadFailed):
            await loader.load(spec(name)).wait()
    await loader.load(spec("c")).wait()
    loader.load(spec("ended"))
    await loader.unload("ended")
    await loader.close()
    await host.close()

    assert ["a", "known", "b", "c", "ended"] == named
    assert ["b", "ended"] == gone


async def test_a_bounded_number_of_failed_loads_is_remembered():
    async with service() as (loader, host, workshop):
        for number in range(MAX_FAILURES + 1):
            workshop.errors[f"b{number}"] = EngineFailed("No.", details={"reason": "gated"})
            with pytest.raises(ModelLoadFailed):
                await loader.load(spec(f"b{number}")).wait()

        assert ("b1", MAX_FAILURES) == (next(iter(loader.failures)), len(loader.failures))
        assert MAX_FAILURES + 1 == len(model_states(host, loader))


async def test_a_model_that_is_replaced_serves_until_the_new_one_does():
    async with service() as (loader, host, workshop):
        workshop.slow.add("a")
        load = loader.replace(spec("a", revision="2"))
        await until(lambda: len(workshop.engines) == 2)
        before = host.find("a").engine
        with host.lease(hello("one")) as old:
            workshop.engines[-1].may_serve.set()
            new = await load.wait()
            while_leased = workshop.engines[0].closings
        await until(lambda: workshop.engines[0].closings == 1)

        assert before is old.engine
        assert new is host.find("a")
        assert new is not old
        assert 0 == while_leased


async def test_requests_that_run_during_a_replacement_all_finish():
    async with service() as (loader, host, _):

        async def send(number: int) -> str:
            await asyncio.sleep(number * 0.002)
            return (await generate(host, hello(f"r{number}")))[0][-1].finish_reason.value  # type: ignore[union-attr]

        sending = [asyncio.create_task(send(number)) for number in range(50)]
        for number in range(5):
            await loader.replace(spec("a", revision=str(number))).wait()

        assert {"stop"} == set(await asyncio.gather(*sending))


@pytest.mark.parametrize("fails", ["load", "try"])
async def test_a_replacement_that_fails_leaves_the_old_model(fails: str):
    async def refuse(model: Served) -> None:
        raise InvalidRequest("It answers nonsense.")

    async with service() as (loader, host, workshop):
        old = host.find("a")
        if fails == "load":
            workshop.errors["a"] = EngineFailed("No.", details={"reason": "bad_file"})
        with pytest.raises(ModelLoadFailed if fails == "load" else InvalidRequest):
            await loader.replace(spec("a", revision="2"), probe=refuse if fails == "try" else None).wait()

        assert old is host.find("a")
        assert ["a"] == workshop.open


async def test_an_unload_ends_a_load_that_is_under_way():
    async with service() as (loader, _host, workshop):
        workshop.slow.add("b")
        load = loader.load(spec("b"))
        await until(lambda: load.engine is not None)
        waiting = asyncio.create_task(load.wait())
        await asyncio.sleep(0)
        await loader.unload("b")

        with pytest.raises(Conflict, match="unloaded before"):
            await waiting
        assert load.task.cancelled()
        assert ["a"] == workshop.open
        with pytest.raises(ModelNotFound):
            await loader.unload("b")


async def test_an_unload_goes_on_when_nobody_waits_for_it():
    """Whoever asked for it may hang up; what is left of the running requests ends after the grace period."""
    async with service() as (loader, host, workshop):
        workshop.engines[0].token_delay_seconds = 60  # type: ignore[attr-defined]
        await loader.load(spec("b")).wait()
        with host.lease(hello("one", model="b")):
            unloading = asyncio.create_task(loader.unload("b", 0.05))
            await asyncio.sleep(0.01)
            unloading.cancel()
            await until(lambda: "b" not in host.names)

        assert ["a"] == workshop.open


async def test_the_idle_model_that_was_used_least_recently_makes_room():
    async with service(max_loaded=3) as (loader, host, workshop):
        for name in "bc":
            await loader.load(spec(name)).wait()
        await generate(host, hello("one", model="b"))
        await loader.load(spec("d")).wait()

        assert ("a", "b", "d") == host.loaded
        assert ["a", "b", "d"] == workshop.open


async def test_a_model_in_use_never_makes_room():
    """Neither does the default one, which the service needs."""
    async with service(max_loaded=2) as (loader, host, _workshop):
        await loader.load(spec("b")).wait()
        with host.lease(hello("one", model="b")), pytest.raises(EngineBusy, match="max_loaded"):
            await loader.load(spec("c")).wait()

        assert ("a", "b") == host.loaded
        await loader.load(spec("c")).wait()
        assert ("a", "c") == host.loaded


async def test_a_model_that_made_room_for_one_that_fails_comes_back():
    async with service(max_loaded=2) as (loader, host, workshop):
        await loader.load(spec("b")).wait()
        workshop.errors["c"] = EngineFailed("No.", details={"reason": "gated"})
        with pytest.raises(ModelLoadFailed):
            await loader.load(spec("c")).wait()
        await until(lambda: "b" in host.loaded)

        assert ["a", "b"] == workshop.open


async def test_a_model_that_makes_room_for_a_load_that_is_ended_meanwhile_comes_back():
    async with service(max_loaded=2) as (loader, host, workshop):
        await loader.load(spec("b")).wait()
        engine = workshop.engines[1]
        engine.may_close.clear()
        loader.load(spec("c"))
        await until(lambda: engine.status().state is EngineState.CLOSED)
        await loader.unload("c")
        engine.may_close.set()
        await until(lambda: "b" in host.loaded)

        assert ["a", "b"] == workshop.open


async def test_a_configured_model_is_loaded_when_a_request_names_it():
    """The request gets 503 with the progress, and one that comes later is served."""
    async with service("b") as (_loader, host, workshop):
        workshop.slow.add("b")
        with pytest.raises(EngineNotReady, match="is being loaded"):
            await generate(host, hello("one", model="b"))
        await until(lambda: len(workshop.engines) == 2)
        with pytest.raises(EngineNotReady) as refusal:
            await generate(host, hello("two", model="b"))
        workshop.engines[-1].may_serve.set()
        await until(lambda: "b" in host.loaded)
        (events,) = await generate(host, hello("three", model="b"))

        assert {"stage": "weights", "bytes_done": 1, "bytes_total": 4} == refusal.value.details
        assert 5 == refusal.value.retry_after
        assert "stop" == finished_of(events).finish_reason


async def test_a_request_waits_for_a_configured_model_where_that_is_configured():
    async with service("b", first_use="wait") as (loader, host, workshop):
        await asyncio.gather(*(loader.ensure("b") for _ in range(10)))
        (events,) = await generate(host, hello("one", model="b"))

        assert "stop" == finished_of(events).finish_reason
        assert ["a", "b"] == workshop.open


async def test_a_request_waits_no_longer_than_is_configured():
    async with service("b", first_use="wait", first_use_seconds=0.05) as (loader, _host, workshop):
        workshop.slow.add("b")
        with pytest.raises(EngineNotReady, match="is being loaded"):
            await loader.ensure("b")


async def test_a_model_that_its_caller_may_not_use_is_not_loaded_for_it():
    async with service("b", first_use="wait") as (loader, host, workshop):
        await loader.ensure("b", allowed=["a"])
        with pytest.raises(ModelNotFound), host.lease(hello("one", model="b"), allowed=["a"]):
            pass

        assert ["a"] == workshop.open


async def test_an_unknown_model_starts_nothing():
    async with service(first_use="wait") as (loader, host, workshop):
        await loader.ensure("stranger")
        with pytest.raises(ModelNotFound):
            await generate(host, hello("one", model="stranger"))

        assert ["a"] == workshop.open


async def test_a_model_that_failed_is_not_loaded_again_by_every_request():
    async with service("b") as (loader, host, workshop):
        workshop.errors["b"] = EngineFailed("It is gated.", details={"reason": "gated"})
        with pytest.raises(EngineNotReady):
            await generate(host, hello("one", model="b"))
        await until(lambda: "b" in loader.failures)
        for number in range(3):
            with pytest.raises(EngineNotReady, match="It is gated"):
                await generate(host, hello(f"r{number}", model="b"))

        assert 2 == len(workshop.engines)


async def test_an_idle_model_is_unloaded_and_comes_back_when_it_is_asked_for():
    async with service(idle_seconds=0.1, first_use="wait") as (loader, host, workshop):
        watching = asyncio.create_task(loader.watch_idle())
        await loader.load(spec("b")).wait()
        with host.lease(hello("one", model="b")):
            await asyncio.sleep(0.3)
            while_leased = host.loaded
        await until(lambda: "b" not in host.names)
        idle = workshop.open
        await loader.ensure("b")

        assert ("a", "b") == while_leased == host.loaded
        assert ["a"] == idle
        watching.cancel()


async def test_an_unloaded_model_stays_away_until_it_is_loaded_again():
    async with service("b", first_use="wait") as (loader, host, _workshop):
        await loader.load(spec("b")).wait()
        await loader.unload("b")
        await loader.ensure("b")
        with pytest.raises(ModelNotFound):
            await generate(host, hello("one", model="b"))
        await loader.load(loader.configured["b"]).wait()

        assert ("a", "b") == host.loaded


async def test_a_load_waits_for_the_unload_of_its_name():
    async with service() as (loader, host, workshop):
        await loader.load(spec("b")).wait()
        workshop.engines[-1].may_close.clear()
        unloading = asyncio.create_task(loader.unload("b"))
        await until(lambda: "b" not in host.loaded)
        loading = asyncio.create_task(loader.load(spec("b", revision="2")).wait())
        await asyncio.sleep(0.02)
        before = len(workshop.engines)
        workshop.engines[-1].may_close.set()
        await asyncio.gather(unloading, loading)

        assert 2 == before
        assert ("a", "b") == host.loaded


async def test_a_model_that_is_replaced_is_closed_when_the_service_ends():
    async with service() as (loader, host, workshop):
        with host.lease(hello("one")):
            await loader.replace(spec("a", revision="2")).wait()
            await loader.close()
            await host.close()

        assert [] == workshop.open


async def test_nothing_is_loaded_while_the_service_drains():
    async with service("b") as (loader, host, _workshop):
        await host.drain(0)
        with pytest.raises(ShuttingDown):
            loader.load(spec("b"))


async def test_closing_ends_every_load():
    async with service() as (loader, _host, workshop):
        workshop.slow |= {"b", "c"}
        loads = [loader.load(spec(name)) for name in "bc"]
        await until(lambda: loads[0].engine is not None)
        waiting = asyncio.create_task(loads[1].wait())
        await asyncio.sleep(0)
        await loader.close()

        with pytest.raises(ShuttingDown):
            await waiting
        assert all(load.task.cancelled() for load in loads)
        assert ["a"] == workshop.open


async def test_an_engine_that_is_being_closed_is_closed_whole_when_the_service_ends():
    """Its process, its files and its share of the spare processes are let go of, before the loader says it is done."""
    async with service() as (loader, _host, workshop):
        await loader.load(spec("b")).wait()
        engine = workshop.engines[1]
        engine.may_close.clear()
        unloading = asyncio.create_task(loader.unload("b", 0))
        await until(lambda: engine.status().state is EngineState.CLOSED)
        closing = asyncio.create_task(loader.close())
        await asyncio.sleep(0.01)
        assert not closing.done()

        engine.may_close.set()
        await closing
        await asyncio.gather(unloading, return_exceptions=True)
        assert 1 == engine.closings


async def test_a_load_that_is_ended_twice_is_closed_whole():
    async with service() as (loader, _host, workshop):
        workshop.slow.add("b")
        load = loader.load(spec("b"))
        await until(lambda: load.engine is not None)
        engine = workshop.engines[1]
        engine.may_close.clear()
        unloads = [asyncio.create_task(loader.unload("b"))]
        await until(lambda: engine.status().state is EngineState.CLOSED)
        unloads.append(asyncio.create_task(loader.unload("b")))
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in unloads)

        engine.may_close.set()
        await asyncio.gather(*unloads)
        assert 1 == engine.closings


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_comes_together_every_request_has_a_model_that_lives(seed: int):
    """Loads that fail, replacements, unloads, evictions and requests in any order, sixty at a time."""
    chance = random.Random(seed)  # repeatable, not secret
    async with service("b", "c", max_loaded=2, first_use="wait", idle_seconds=0.02) as (loader, host, workshop):
        walk = Walk(loader, host, workshop, chance)
        watching = asyncio.create_task(loader.watch_idle())
        running = [asyncio.create_task(walk.step(number)) for number in range(60)]
        await asyncio.wait_for(asyncio.gather(*running), START_SECONDS)
        watching.cancel()
        while loader.loads or set(host.names) != set(host.loaded):  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)

        assert sorted(host.loaded) == sorted(workshop.open)
        assert {"a"} <= set(host.loaded)
        assert len(host.loaded) <= 2


class Walk:
    """Does one thing after another with the models of a service."""

    def __init__(self, loader: ModelLoader, host: ModelHost, workshop: Workshop, chance: random.Random) -> None:
        self.loader, self.host, self.workshop, self.chance = loader, host, workshop, chance

    async def step(self, number: int) -> None:
        """Wait a moment, and do one of the things; refusals are as they should be."""
        name = self.chance.choice("abc")
        do = self.chance.choice([self.generate] * 4 + [self.load, self.replace, self.unload, self.fail])
        await asyncio.sleep(self.chance.random() * 0.2)
        with suppress(ModelLoadFailed, ModelNotFound, EngineNotReady, EngineBusy, Conflict):
            await do(name, number)

    async def generate(self, name: str, number: int) -> None:
        await self.loader.ensure(name)
        with self.host.lease(hello(f"r{number}", model=name)) as model:
            for _ in range(5):
                await asyncio.sleep(self.chance.random() * 0.01)
                assert model.engine.status().state is EngineState.READY

    async def load(self, name: str, number: int) -> None:
        await self.loader.load(spec(name)).wait()

    async def replace(self, name: str, number: int) -> None:
        await self.loader.replace(spec(name, revision=str(number))).wait()

    async def unload(self, name: str, number: int) -> None:
        if name != "a":
            await self.loader.unload(name, 5)

    async def fail(self, name: str, number: int) -> None:
        self.workshop.errors[name] = EngineFailed("No.", details={"reason": "bad_file"})
        try:
            await self.replace(name, number)
        finally:
            self.workshop.errors.pop(name, None)


async def test_a_token_is_for_one_load_only():
    """It is shown nowhere, and a model that comes back after it was unloaded comes without it."""
    async with service(max_loaded=2, first_use="wait") as (loader, _host, workshop):
        secret = LoadSpec(name="b", config=ModelConfig(name="owner/b", source="hub"), hub_token="hf_canary")
        await loader.load(secret).wait()
        await loader.load(spec("c")).wait()
        await loader.ensure("b")

        assert "hf_canary" not in repr(secret)
        assert ["hf_canary", None] == [each.spec.hub_token for each in workshop.engines if each.spec.name == "b"]
