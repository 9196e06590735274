"""Loads and unloads models while the service runs.

Decides that each name has one load, what is unloaded to make room, and that a model is visible only once it serves.
`host.py` holds what is loaded; the worker processes load.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

from app.config.model import ModelHosting
from app.engine.adapters import PreparedAdapters
from app.engine.host import NAME_OF_ADAPTER, ModelHost
from app.engine.model_load import FailedLoad, Load, finished_load, load_error
from app.engine.model_source import LoadSpec
from app.engine.served_model import Served, ServedEncoder
from app.engine.uninterrupted import uninterrupted
from app.errors import (
    AppError,
    ConfigError,
    Conflict,
    EngineBusy,
    EngineFailed,
    EngineNotReady,
    ModelLoadFailed,
    ModelNotFound,
    ShuttingDown,
)
from app.types import EngineState

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""How long a failed load answers for its model before a request begins another one."""
BUSY_RETRY_SECONDS = 10.0
MAX_FAILURES = 100
"""Failed loads that are remembered."""

Probe = Callable[[Served], Awaitable[None]]
"""Has a loaded model show that it works, before any request gets it.  Raises: AppError: it does not."""


class ModelLoader:
    """Loads models into a host, and unloads them; lives as long as the application."""

    def __init__(
        self,
        host: ModelHost,
        build: Callable[[LoadSpec], Served],
        rules: ModelHosting,
        *,
        loaded: Iterable[LoadSpec] = (),
        configured: Iterable[LoadSpec] = (),
        on_name: Callable[[str], None] = lambda name: None,
        on_name_gone: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Args:
        build: makes everything of one model, without starting it.
        rules: how many models there may be, and for how long.
        loaded: those that the host starts with.
        configured: those that are loaded when a request names them.
        on_name: is called with the name of each model that is going to be loaded.
        on_name_gone: is called with it where the load fails, and nothing else of this name is here or may come.
        """
        self._host = host
        self._build = build
        self._rules = rules
        self._on_name = on_name
        self._on_name_gone = on_name_gone
        self._specs = {spec.name: spec for spec in loaded}
        """What is loaded, without the models that only embed."""
        self.configured: Mapping[str, LoadSpec] = {spec.name: spec for spec in configured}
        self._known = dict(self.configured)
        """What a request may have loaded by its name."""
        self._loads: dict[str, Load] = {}
        self._failures: dict[str, FailedLoad] = {}
        """Why the last load of a model failed, until the next one."""
        self._in_turn = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        host.on_absent = self._begin_on_first_use
        host.is_reserved = lambda name: name in self._known or name in self._loads

    @property
    def loaded(self) -> Mapping[str, LoadSpec]:
        """Return what is loaded, or was when the service started, without the models that only embed."""
        return self._specs

    @property
    def loads(self) -> Mapping[str, Load]:
        """Return the loads that are under way, by the names of their models."""
        return self._loads

    @property
    def known(self) -> Mapping[str, LoadSpec]:
        """Return what a request may have loaded by its name, loaded or not."""
        return self._known

    @property
    def failures(self) -> Mapping[str, FailedLoad]:
        """Return why the last loads of models failed, by their names."""
        return self._failures

    def load(self, spec: LoadSpec) -> Load:
        """Begin to load a model; any number of calls with the same one share a load.

        Raises: Conflict: another model of this name is loaded, or is being loaded, or an adapter has it, or the default
            model is to be one that only embeds; ShuttingDown.
        """
        self._refuse_while_draining()
        self._refuse_other_task(spec)
        if self._host.adapters.knows(spec.name):
            raise Conflict(NAME_OF_ADAPTER)
        if (load := self._loads.get(spec.name)) is not None and not load.task.done():
            if not load.spec.is_same(spec):
                raise Conflict("Another model of this name is being loaded; wait for it, or unload it.")
            return load
        if spec.name in self._host.loaded:
            model = self._host.find(spec.name)
            if model.engine.status().state is not EngineState.FAILED:
                if (loaded := self._specs.get(spec.name)) is None or not loaded.is_same(spec):
                    raise Conflict("Another model of this name is loaded; unload it, or replace it.")
                return finished_load(spec, model)
        return self._begin(spec, None)

    def replace(self, spec: LoadSpec, *, probe: Probe | None = None) -> Load:
        """Begin to load a model beside the one of its name, which serves until the new one can, and then ends.

        No request fails for it.  If the load or `probe` fails, the old model stays.  Without an old one it is an
        ordinary load.

        Raises: Conflict: a model of this name is being loaded, or the old one does something else; ShuttingDown.
        """
        self._refuse_while_draining()
        self._refuse_other_task(spec)
        if (load := self._loads.get(spec.name)) is not None and not load.task.done():
            raise Conflict("A model of this name is being loaded; wait for it.")
        return self._begin(spec, probe)

    async def unload(self, name: str, grace_seconds: float | None = None) -> None:
        """Unload a model as `ModelHost.unload` does, or end its load; it stays away until it is loaded again.

        Args: grace_seconds: how long live requests may take; None is what is configured.
        Raises: ModelNotFound: no such model is loaded or being loaded.
        """
        grace = self._rules.unload_grace_seconds if grace_seconds is None else grace_seconds
        if (load := self._loads.get(name)) is not None:
            load.task.cancel()
            await asyncio.wait({load.task})
            if name not in self._host.loaded:
                self._known.pop(name, None)
                return
        if name not in self._host.loaded:
            raise ModelNotFound("This model is not loaded.")
        self._known.pop(name, None)
        self._host.adapters.forget_entries(name)
        await self._unload(name, grace)

    async def ensure(self, name: str | None, allowed: Collection[str] | None = None) -> None:
        """Wait for a model that can be loaded on its first use, where the configuration says so.

        Raises: EngineNotReady: it takes longer than a request may wait.  ModelLoadFailed and others of `Load.wait`.
        """
        named = self._host.default_name if name is None else name
        may_use = allowed is None or named in allowed
        name = self._host.adapters.base_of(named) or named
        if self._rules.first_use != "wait" or name in self._host.loaded or not may_use:
            return
        if (load := self._load_of(name)) is not None:
            await asyncio.wait({load.task}, timeout=self._rules.first_use_seconds)
            if not load.task.done():
                raise load.still_loading()

    async def end_loads(self) -> None:
        """End all loads, since the service ends."""
        loads = tuple(self._loads.values())
        for load in loads:
            load.end_error = ShuttingDown()
            load.task.cancel()
        if loads:
            await asyncio.wait({load.task for load in loads})

    async def close(self) -> None:
        """End all loads and unloads; what is loaded is the host's."""
        await self.end_loads()
        background = tuple(self._background)
        for task in background:
            task.cancel()
        if background:
            await asyncio.wait(background)

    async def watch_idle(self) -> None:
        """Unload models that have been idle for too long, until cancelled."""
        seconds = self._rules.idle_seconds
        while seconds:
            await asyncio.sleep(min(max(seconds / 4, 0.05), 10.0))
            for name in tuple(self._specs):
                if name in self._idle() and time.monotonic() - self._host.use_of(name).last_at > seconds:
                    log.info("a model without requests is unloaded: %s", name)
                    await self._evict(name)

    def _refuse_while_draining(self) -> None:
        if self._host.draining:
            raise ShuttingDown()

    def _refuse_other_task(self, spec: LoadSpec) -> None:
        """Raises: Conflict: requests of the name's model could not be served by this one."""
        embeds = spec.task == "embed"
        if embeds and spec.name == self._host.default_name:
            raise Conflict("The default model generates; give this one, which only embeds texts, another name.")
        if spec.name in self._host.loaded and isinstance(self._host.find(spec.name), ServedEncoder) != embeds:
            raise Conflict("A model of this name that does something else is loaded; unload it first.")

    def _begin_on_first_use(self, name: str) -> None:
        """Raises: EngineNotReady: a model is being loaded, or could not be."""
        if (load := self._load_of(name)) is not None:
            raise load.still_loading()

    def _load_of(self, name: str) -> Load | None:
        """Return the load of a model, which begins where it can be loaded on its first use; None for any other.

        Raises: EngineNotReady: it failed a moment ago.
        """
        if (load := self._loads.get(name)) is not None or name not in self._known:
            return load
        failure = self._failures.get(name)
        if failure is not None and time.monotonic() - failure.at < RETRY_SECONDS:
            raise EngineNotReady(failure.message, details=failure.details, retry_after=RETRY_SECONDS)
        return self.load(self._known[name])

    def _begin(self, spec: LoadSpec, probe: Probe | None) -> Load:
        load = self._loads[spec.name] = Load(spec)
        self._failures.pop(spec.name, None)
        self._on_name(spec.name)
        load.task = asyncio.create_task(self._load(load, probe), name="load of a model")
        load.task.add_done_callback(lambda task: self._end(load))
        return load

    def _end(self, load: Load) -> None:
        name = load.spec.name
        if self._loads.get(name) is load:
            del self._loads[name]
        if name not in self._host.loaded and name not in self._known and name not in self._loads:
            self._on_name_gone(name)
        # Also retrieves it: whoever began the load may not have waited for it.
        error = None if load.task.cancelled() else load.task.exception()
        if isinstance(error, AppError):
            self._failures[name] = FailedLoad(time.monotonic(), error.message, error.details)
            if len(self._failures) > MAX_FAILURES:
                del self._failures[next(iter(self._failures))]
            log.warning("%s: %s", name, error.message)
        elif error is not None:
            log.error("%s could not be loaded", name, exc_info=error)

    async def _load(self, load: Load, probe: Probe | None) -> Served:
        async with self._in_turn:
            evicted: list[LoadSpec] = []
            try:
                await self._evict_idle(load.spec.name, evicted)
                await self._host.wait_unloaded(load.spec.name)
                return await self._start(load, probe)
            except BaseException:
                # A load that fails changes nothing.
                for spec in evicted:
                    self._in_background(self._reload(spec))
                raise

    async def _start(self, load: Load, probe: Probe | None) -> Served:
        try:
            model = self._build(load.spec)
        except ConfigError as error:
            raise ModelLoadFailed(f"The model cannot be loaded: {error}.", details={"reason": "failed"}) from error
        load.engine = model.engine
        try:
            await model.engine.start()
            await model.engine.wait_ready()
            if probe is not None:
                await probe(model)
            # No await between the two: what is loaded or unloaded meanwhile is among the prepared ones.
            adapters = await self._host.adapters.prepare(model)
            self._publish(load.spec, model, adapters)
        except BaseException as error:
            await uninterrupted(model.engine.close())
            if isinstance(error, EngineFailed):
                raise load_error(error) from error
            raise
        return model

    def _publish(self, spec: LoadSpec, model: Served, adapters: PreparedAdapters) -> None:
        """Let requests have a model that serves; one of the configuration is also loaded on its first use again."""
        if spec.name in self.configured:
            self._known[spec.name] = self.configured[spec.name]
        if spec.name in self._host.loaded:
            old = self._host.switch(model, adapters)
            self._in_background(self._host.retire(old, self._rules.unload_grace_seconds))
        else:
            self._host.put(model, adapters)
        self._specs[spec.name] = replace(spec, hub_token=None)

    async def _evict_idle(self, name: str, evicted: list[LoadSpec]) -> None:
        """Unload idle models, least recently used first, until one more may be loaded.

        Args: evicted: gets the spec of each before it is unloaded: this may be cancelled meanwhile.
        Raises: EngineBusy: all are in use.
        """
        most = self._rules.max_loaded
        while most is not None and len(self._specs.keys() - {name}) >= most:
            idle = [each for each in self._idle() if each != name]
            if not idle:
                reason = f"{most} models are loaded (model.max_loaded), and none of them may be unloaded now."
                raise EngineBusy(reason, retry_after=BUSY_RETRY_SECONDS)
            victim = min(idle, key=lambda each: self._host.use_of(each).last_at)
            log.info("a model is unloaded to make room: %s", victim)
            evicted.append(self._specs[victim])
            await self._evict(victim)

    def _idle(self) -> list[str]:
        """Return the models that nothing keeps loaded."""
        required = {self._host.default_name} if self._rules.required else set()
        return [
            name
            for name in self._specs
            if name in self._host.loaded and name not in required and name not in self._loads
            if not self._host.is_leased(name)
        ]

    async def _evict(self, name: str) -> None:
        """Unload an idle model, which a request can bring back."""
        self._known[name] = self._specs[name]
        await self._unload(name, 0)

    async def _reload(self, spec: LoadSpec) -> None:
        if spec.name not in self._host.loaded and not self._host.draining:
            with suppress(AppError):  # logged, and remembered as the model's failure
                await self.load(spec).wait()

    async def _unload(self, name: str, grace_seconds: float) -> None:
        """Unload a model; no request gets it from the call on, and the unload goes on when its caller does not."""
        model = self._host.begin_unload(name)
        self._specs.pop(name, None)
        await asyncio.shield(self._in_background(self._host.finish_unload(model, grace_seconds)))

    def _in_background(self, work: Awaitable[None]) -> asyncio.Task[None]:
        async def run() -> None:
            await work

        task = asyncio.create_task(run(), name="unload of a model")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
