"""The models that are loaded: loaded once, leased by requests, drained and unloaded."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches

from app.embeddings import EmbeddingRequest
from app.engine.adapters import AdapterEntry, AdapterRegistry, PreparedAdapters
from app.engine.leases import Leases
from app.engine.served_model import EmbeddingChain, Served, ServedEncoder, ServedModel
from app.engine.uninterrupted import uninterrupted
from app.errors import AppError, Conflict, InvalidRequest, ModelNotFound, ShuttingDown
from app.requests import GenerationRequest
from app.types import EngineState


@dataclass(slots=True)
class ModelUse:
    """How a loaded model has been used."""

    requests: int = 0
    last_at: float = field(default_factory=time.monotonic)
    """When the last request ended or, before there was one, when it was loaded; by the monotonic clock."""


NAME_OF_ADAPTER = "An adapter has this name; give the model another one."


class ModelHost:
    """Holds the served models by their public names; lives as long as the application."""

    def __init__(
        self, build: Callable[[str], Served], default: str, *, adapters: AdapterRegistry | None = None
    ) -> None:
        """Args:
        build: makes everything of one model by its name, without starting it; raises ModelNotFound for another name.
        default: serves requests that name no model.
        adapters: holds the adapters of the models; their names may stand for those of their models.
        """
        self._build = build
        self.adapters = adapters or AdapterRegistry()
        self.default_name = default
        self.since = int(time.time())
        """When the host was created, in seconds since 1970."""
        self._models: dict[str, Served] = {}
        self._started: set[str] = set()
        self._unloading: dict[str, asyncio.Event] = {}
        """Model -> set once it is gone and its name is free again."""
        self._leases = Leases[Served]()
        self._use: dict[str, ModelUse] = {}
        self._replaced: list[Served] = []
        """Models that are drained while another has their name."""
        self.on_absent: Callable[[str], None] = lambda name: None
        """Is called with the name of a model that a request wants and that is not loaded; may raise EngineNotReady."""
        self.is_reserved: Callable[[str], bool] = lambda name: False
        """Whether a name is that of a model which a request may have loaded."""
        self.draining = False
        """New requests are refused; live ones may finish."""
        self.over = False
        """The grace period has ended: nothing starts any more, not even what was admitted before."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all models, the default one first."""
        return tuple(sorted(self._models, key=lambda name: name != self.default_name))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Return the names of the models that take requests, the default one first."""
        return tuple(name for name in self.names if name not in self._unloading)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Return the names of the adapters whose models take requests."""
        # Another model may have taken the name of the one that an adapter is for.
        return tuple(
            each.name
            for each in self.adapters.adapters
            if self._models.get(each.model) is each.served and each.model not in self._unloading
        )

    @property
    def default(self) -> ServedModel:
        """Return the default model.

        Raises: ModelNotFound: it is not loaded.
        """
        # Whoever asks how it is does not have it loaded.
        return _generating(self.find(None))

    @property
    def models(self) -> tuple[Served, ...]:
        """Return all models, the default one first."""
        return tuple(self._models[name] for name in self.names)

    @property
    def state(self) -> EngineState | None:
        """Return the state of the default model; None if it is not loaded."""
        model = self._models.get(self.default_name)
        return None if model is None else model.engine.status().state

    @property
    def can_serve(self) -> bool:
        """Return whether the default model can serve a request now."""
        return self.state is EngineState.READY

    def find(self, model: str | None, *, allowed: Collection[str] | None = None) -> Served:
        """Return a model by its name, or the default one for None.

        Args: allowed: the models that a refusal may name, as those that the caller may use; None is all.
        Raises: ModelNotFound: no such model is loaded.
        """
        name = self.default_name if model is None else model
        if name not in self._models or name in self._unloading:
            usable = (*self.loaded, *self.adapter_names)
            raise ModelNotFound(_missing(name, [each for each in usable if allowed is None or each in allowed]))
        return self._models[name]

    def use_of(self, name: str) -> "ModelUse":
        """Return how a model has been used since it was loaded."""
        return self._use.setdefault(name, ModelUse())

    def is_leased(self, name: str) -> bool:
        """Return whether a request holds a model now."""
        model = self._models.get(name)
        return model is not None and self._leases.is_leased(model)

    def _find_wanted(self, model: str | None, allowed: Collection[str] | None) -> Served:
        """Return a model by its own name or an adapter's; a missing one that may be loaded on its first use is."""
        base = self.adapters.base_of(model)
        try:
            return self.find(base, allowed=allowed)
        except ModelNotFound:
            if not self.draining and (allowed is None or (model or self.default_name) in allowed):
                self.on_absent(base or self.default_name)
            raise

    def find_generating(self, model: str | None, *, allowed: Collection[str] | None = None) -> ServedModel:
        """Return a model that generates, by its own name or that of one of its adapters.

        Raises: ModelNotFound: no such model is loaded; InvalidRequest: it only embeds; EngineNotReady: it, or the
            adapter, is being loaded; AdapterNotFound: the model could not be loaded with this adapter.
        """
        found = _generating(self._find_wanted(model, allowed))
        self.adapters.check(model, found)
        return found

    def find_embedding(
        self, model: str | None, *, allowed: Collection[str] | None = None
    ) -> tuple[Served, EmbeddingChain]:
        """Return a model that embeds, for None the first that does and nothing else, or the default one.

        Raises: ModelNotFound: no such model is loaded; InvalidRequest: it does not embed, or none does; EngineNotReady:
            it is being loaded.
        """
        if model is None:
            encoders = (each.name for each in self.models if isinstance(each, ServedEncoder))
            model = next((name for name in encoders if name not in self._unloading), None)
        if model is not None and self.adapters.knows(model):
            raise InvalidRequest.of_field("model", "names an adapter; texts are embedded by models without one")
        found = self._find_wanted(model, allowed)
        if found.embeddings is None:
            able = (each.name for each in self.models if each.embeddings is not None)
            others = ", ".join(name for name in able if allowed is None or name in allowed)
            known = f"these do: {others}" if others else "no model of this service does"
            raise InvalidRequest.of_field("model", f"names a model that does not embed texts; {known}")
        return found, found.embeddings

    def add(self, name: str) -> Served:
        """Build a model, once for any number of callers, and start it with the host.

        Raises: ModelNotFound, ConfigError: it cannot be built.
        """
        if name not in self._models:
            self._models[name] = self._build(name)
            self._use[name] = ModelUse()
        return self._models[name]

    async def start(self) -> None:
        """Start the models that have been added; `engine.wait_ready` reports when they can serve."""
        for name in tuple(self._models):
            await self.load(name)

    async def load(self, name: str) -> Served:
        """Build and start a model, once for any number of callers; `engine.wait_ready` reports when it can serve.

        Waits for an unload of the same model that has begun.

        Raises: ModelNotFound, ConfigError: it cannot be built; ShuttingDown.
        """
        await self.wait_unloaded(name)
        if self.draining:
            raise ShuttingDown()
        model = self.add(name)
        if name not in self._started:
            self._started.add(name)
            try:
                await model.engine.start()
            except BaseException:
                # A model that is being unloaded is removed by that, once it has closed.
                if self._models.get(name) is model and name not in self._unloading:
                    self._remove(name)
                await uninterrupted(model.engine.close())
                raise
        return model

    async def load_adapters(self) -> None:
        """Load the configured adapters of the models that the host starts with, as soon as each model serves."""
        async with asyncio.TaskGroup() as models:
            for model in tuple(self._models.values()):
                models.create_task(self._load_adapters_of(model))

    async def _load_adapters_of(self, model: Served) -> None:
        if not self.adapters.of_model(model.name):
            return
        try:
            await model.engine.wait_ready()
        except AppError:  # the model is reported as failed
            return
        prepared = await self.adapters.prepare(model)
        if self._models.get(model.name) is model:
            self.adapters.adopt(model, prepared)

    def put(self, model: Served, adapters: PreparedAdapters | None = None) -> None:
        """Take over a model that has been started and serves, under its name.

        Args: adapters: those that were prepared for it.
        Raises: ShuttingDown; Conflict: an adapter has its name; ValueError: another model has it.
        """
        self._refuse_while_draining()
        if self.adapters.knows(model.name):
            raise Conflict(NAME_OF_ADAPTER)
        if model.name in self._models:
            raise ValueError("a model of this name is loaded already")
        self.adapters.adopt(model, adapters or {})
        self._models[model.name] = model
        self._started.add(model.name)
        self._use[model.name] = ModelUse()

    def switch(self, model: Served, adapters: PreparedAdapters | None = None) -> Served:
        """Put a model that serves in the place of the one of its name, and return that one for `retire`.

        Each new request gets the new model, and its adapters; those that run end on the old one.

        Args: adapters: those that were prepared for the new one; others of the old one end with it.
        Raises: ModelNotFound: no model of this name is loaded; ShuttingDown.
        """
        self._refuse_while_draining()
        old = self.find(model.name)
        self.adapters.adopt(model, adapters or {})
        self._models[model.name] = model
        self._use[model.name] = ModelUse()
        self._replaced.append(old)
        self.adapters.forget_model(old)
        return old

    async def retire(self, model: Served, grace_seconds: float) -> None:
        """Drain and close a model that was replaced, as `unload` does."""
        try:
            await self._drain(model, grace_seconds)
        finally:
            self._replaced.remove(model)

    async def _drain(self, model: Served, grace_seconds: float) -> None:
        try:
            if not await self._leases.wait_released(grace_seconds, model):
                await self._abort(model)
        finally:
            await uninterrupted(model.engine.close())

    def _remove(self, name: str) -> None:
        self.adapters.forget_model(self._models.pop(name, None))
        self._use.pop(name, None)
        self._started.discard(name)
        if (unloading := self._unloading.pop(name, None)) is not None:
            unloading.set()

    async def unload(self, name: str, grace_seconds: float) -> None:
        """Refuse new requests of a model, let the live ones finish, end the rest after the grace period, and close it.

        Raises: ModelNotFound: no such model is loaded.
        """
        await self.finish_unload(self.begin_unload(name), grace_seconds)

    def begin_unload(self, name: str) -> Served:
        """Refuse new requests of a model from now on, and return it for `finish_unload`.

        Raises: ModelNotFound: no such model is loaded.
        """
        model = self.find(name)
        self._unloading[name] = asyncio.Event()
        return model

    async def finish_unload(self, model: Served, grace_seconds: float) -> None:
        """Drain and close a model whose unload has begun, and free its name."""
        try:
            await self._drain(model, grace_seconds)
        finally:
            self._remove(model.name)

    async def wait_unloaded(self, name: str) -> None:
        """Wait for the end of an unload, if one has begun."""
        while (unloading := self._unloading.get(name)) is not None:
            await unloading.wait()

    async def load_adapter(self, name: str, source: str, model: str | None) -> AdapterEntry:
        """Load an adapter of a model, or of the default one for None, under a name of its own.

        Raises: ModelNotFound: no such model is loaded; ShuttingDown; Conflict: a model has this name; others as
            `AdapterRegistry.load`.
        """
        self._refuse_while_draining()
        if name in self._models or self.is_reserved(name):
            raise Conflict("A model has this name; give the adapter another one.")
        served = self.find_generating(model)
        entry = await self.adapters.load(name, source, served)
        if self._models.get(served.name) is not served or served.name in self._unloading:
            await self.adapters.unload(name)
            raise Conflict("The model was replaced or unloaded while the adapter was read; load the adapter again.")
        return entry

    @contextmanager
    def lease(self, request: GenerationRequest, *, allowed: Collection[str] | None = None) -> Iterator[ServedModel]:
        """Hold a model, and the adapter that the request names, for one request.

        Args: allowed: as `find` takes it.
        Raises: ShuttingDown: the service takes no new work; ModelNotFound: no such model is loaded; InvalidRequest: it
            does not generate, or the adapter is for another model; AdapterNotFound.
        """
        self._refuse_while_draining()
        named = self.adapters.named_by(request.model, request.adapter)
        model = self.find_generating(named or request.model, allowed=allowed)
        adapter = self.adapters.get(named)
        with self._lease(model, request.sample_ids), self.adapters.lease(adapter, request.sample_ids):
            yield model

    @contextmanager
    def lease_embedding(
        self, request: EmbeddingRequest, *, allowed: Collection[str] | None = None
    ) -> Iterator[tuple[Served, EmbeddingChain]]:
        """Hold a model that embeds for one request.

        Raises: as `lease`, for models that do not embed.
        """
        self._refuse_while_draining()
        model, chain = self.find_embedding(request.model, allowed=allowed)
        with self._lease(model, (request.id,)):
            yield model, chain

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ShuttingDown()

    @contextmanager
    def _lease(self, model: Served, ids: tuple[str, ...]) -> Iterator[None]:
        use = self.use_of(model.name)
        use.requests += 1
        with self._leases.lease(model, ids):
            try:
                yield
            finally:
                use.last_at = time.monotonic()

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new requests, let the live ones finish, and end what is left after the grace period."""
        self.draining = True
        if not await self._leases.wait_released(grace_seconds):
            await self.abort_all()

    async def abort_all(self) -> None:
        """End every live request with FinishReason.ABORT; nothing starts after it."""
        self.draining = self.over = True
        self._leases.end_waits()
        for model in (*self._models.values(), *self._replaced):
            await self._abort(model)

    async def close(self) -> None:
        """Stop every engine; live requests end with FinishReason.ABORT."""
        self.draining = True
        for model in (*self._models.values(), *self._replaced):
            await model.engine.close()

    async def _abort(self, model: Served) -> None:
        for request_id in self._leases.request_ids(model):
            await model.engine.abort(request_id)


def _generating(model: Served) -> ServedModel:
    """Raises: InvalidRequest: it only embeds."""
    if isinstance(model, ServedEncoder):
        raise InvalidRequest.of_field("model", "names a model that only embeds texts; send it to /v1/embeddings")
    return model


def _missing(wanted: str, names: Collection[str]) -> str:
    """Return what a client may do whose model is not loaded.  Args: names: the models that it may use."""
    if not names:
        return "This model is not loaded, and neither is any other that this key may use."
    meant = next(iter(get_close_matches(wanted, names, n=1)), None)
    suggestion = f" Is it {meant}?" if meant else ""
    return f"This model is not loaded.{suggestion} Loaded: {', '.join(names)}. Leave `model` out to use the default."
