"""The adapters that requests can name: loaded by name, leased by requests, drained and unloaded.

Decides which adapters belong to a model: they are loaded with it, again where it comes back or is replaced.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import PurePath

from msgspec import structs

from app.config import AdaptersConfig
from app.engine.adapter_source import find_adapter_files, find_configured_files
from app.engine.leases import Leases
from app.engine.served_model import Served, ServedEncoder, ServedModel
from app.errors import AdapterNotFound, AppError, Conflict, EngineNotReady, InvalidRequest
from app.ipc.messages import AdapterLoaded
from app.requests import GenerationRequest

log = logging.getLogger(__name__)

LOADING_RETRY_SECONDS = 2.0
"""After which a request may come back that names an adapter which is being read."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter in the memory of a model's worker."""

    name: str
    source: str
    """The folder that it was loaded from, relative to its root: others need not know where that is."""
    served: ServedModel
    """The model that it is for."""
    facts: AdapterLoaded
    since: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @property
    def model(self) -> str:
        """The name of the model that it is for."""
        return self.served.name


@dataclass(slots=True, eq=False)
class AdapterEntry:
    """An adapter behind its name, which is loaded whenever its model is."""

    name: str
    source: str
    """A folder, as whoever loads it writes it."""
    model: str
    """The name of the model that it is for."""
    is_configured: bool = False
    adapter: Adapter | None = None
    """None while it is not loaded."""
    problem: str | None = None
    """Why the model that serves now does not have it."""
    digest: str | None = None
    """Of the files as they were first loaded; others in their place are refused."""

    @property
    def shown_source(self) -> str:
        """The folder as others may see it, who need not know where its root is."""
        if self.adapter is not None:
            return self.adapter.source
        return PurePath(self.source).name if PurePath(self.source).is_absolute() else self.source


PreparedAdapters = Mapping[AdapterEntry, Adapter | AppError]
"""Adapters that have been loaded into a model before it serves, or why they could not be."""


class AdapterRegistry:
    """Holds the adapters by their names; lives as long as the application."""

    def __init__(self, config: AdaptersConfig | None = None, *, default_model: str = "") -> None:
        """Args: default_model: has the configured adapters that name no model."""
        self.config = config or AdaptersConfig()
        self._entries = {
            each.name: AdapterEntry(each.name, each.source, each.model or default_model, is_configured=True)
            for each in self.config.preload
        }
        self._loading: set[str] = set()
        self._leases = Leases[Adapter]()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Return all adapters that are loaded, in the order in which they were first named."""
        return tuple(each.adapter for each in self._entries.values() if each.adapter is not None)

    @property
    def entries(self) -> tuple[AdapterEntry, ...]:
        """Return all adapters, loaded or not."""
        return tuple(self._entries.values())

    def get(self, name: str | None) -> Adapter | None:
        """Return an adapter by its name; None where none is loaded under it."""
        entry = None if name is None else self._entries.get(name)
        return None if entry is None else entry.adapter

    def knows(self, name: str) -> bool:
        """Return whether a name is an adapter's, loaded or not."""
        return name in self._entries

    def base_of(self, name: str | None) -> str | None:
        """Return the name of the model that an adapter is for, and any other name as it is."""
        entry = None if name is None else self._entries.get(name)
        return name if entry is None else entry.model

    def of_model(self, model: str) -> list[AdapterEntry]:
        """Return the adapters of a model, loaded or not."""
        return [each for each in self._entries.values() if each.model == model]

    def named_by(self, model: str | None, adapter: str | None) -> str | None:
        """Return the adapter that a request names, as its `adapter` or as its `model`; None where it names none.

        Raises: AdapterNotFound: there is no such adapter; InvalidRequest: model and adapter contradict each other.
        """
        if adapter is None:
            return model if model is not None and self.knows(model) else None
        if (entry := self._entries.get(adapter)) is None:
            raise AdapterNotFound("This adapter is not loaded. GET /v1/models lists those that are.")
        if model in (None, adapter, entry.model):
            return adapter
        if self.knows(model):
            raise InvalidRequest.of_field("adapter", "and model name two different adapters; leave one of them out")
        raise InvalidRequest.of_field("adapter", "is for another model than the one that this request names")

    def check(self, name: str | None, served: ServedModel) -> None:
        """Check that a model has an adapter, where a name is one's.

        Raises: EngineNotReady: it is being read; AdapterNotFound: it could not be.
        """
        entry = None if name is None else self._entries.get(name)
        if entry is None or (entry.adapter is not None and entry.adapter.served is served):
            return
        if entry.problem is not None:
            raise AdapterNotFound("This adapter could not be loaded with its model. GET /status says why.")
        raise EngineNotReady("This adapter is being loaded.", retry_after=LOADING_RETRY_SECONDS)

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """Return a leased request with the adapter that it names, by name and by digest.

        Raises: as `named_by`.
        """
        adapter = self.get(self.named_by(request.model, request.adapter))
        if adapter is None:
            return request
        return structs.replace(request, adapter=adapter.name, adapter_digest=adapter.facts.digest)

    async def load(self, name: str, source: str, served: ServedModel) -> AdapterEntry:
        """Load an adapter of a model under a name of its own.

        Raises: InvalidRequest: it cannot be used, or the model takes none.  Conflict: the name is taken, or there are
            as many as there may be.  EngineNotReady, EngineFailed.
        """
        if served.adapters is None:
            raise InvalidRequest.of_field("model", "names a model that takes no adapters")
        if name in self._loading or self.get(name) is not None:
            raise Conflict("An adapter of this name is loaded already; unload it first.")
        if len(self.adapters) + len(self._loading) >= self.config.max_loaded:
            raise Conflict("As many adapters are loaded as may be (adapters.max_loaded); unload one first.")
        self._loading.add(name)
        try:
            entry = AdapterEntry(name, source, served.name)
            entry.adapter = await self._read(entry, served)
        finally:
            self._loading.remove(name)
        self._entries[name] = entry
        return entry

    async def prepare(self, served: Served) -> PreparedAdapters:
        """Load the adapters of a model's name into a model that is to serve under it.

        `adopt` has to follow before anything else runs.
        """
        prepared: dict[AdapterEntry, Adapter | AppError] = {}
        while (entry := next(self._missing(served, prepared), None)) is not None:
            try:
                prepared[entry] = await self._prepared(entry, served, prepared.values())
            except AppError as error:
                prepared[entry] = error
        return prepared

    def adopt(self, served: Served, prepared: PreparedAdapters) -> None:
        """Let requests have the adapters that were prepared for a model which serves from now on."""
        for entry, outcome in prepared.items():
            current = self._entries.get(entry.name) is entry
            if isinstance(outcome, Adapter):
                if current:
                    entry.adapter, entry.problem = outcome, None
                elif outcome.served.adapters is not None:
                    # It was unloaded meanwhile, or another one has its name.
                    outcome.served.adapters.unload_adapter(outcome.facts.digest)
            elif current:
                entry.problem = outcome.message
                log.warning("the adapter %s is not served with %s: %s", entry.name, served.name, outcome.message)

    async def unload(self, name: str) -> AdapterEntry:
        """Refuse new requests for an adapter, let the live ones finish, abort the rest, and free its memory.

        Raises: AdapterNotFound: there is none of this name.
        """
        entry = self._entries.pop(name, None)
        if entry is None:
            raise AdapterNotFound("This adapter is not loaded.")
        adapter = entry.adapter
        if adapter is None or adapter.served.adapters is None:
            return entry
        try:
            if not await self._leases.wait_released(self.config.grace_seconds, adapter):
                for request_id in self._leases.request_ids(adapter):
                    await adapter.served.engine.abort(request_id)
        finally:
            adapter.served.adapters.unload_adapter(adapter.facts.digest)
        return entry

    def forget_model(self, served: object) -> None:
        """Note that a model has ended, and its adapters with its worker; they come back with it."""
        for entry in self._entries.values():
            if entry.adapter is not None and entry.adapter.served is served:
                entry.adapter = None

    def forget_entries(self, model: str) -> None:
        """Drop the adapters of a model that stays away until it is loaded again, but for the configured ones."""
        for entry in self.of_model(model):
            if not entry.is_configured:
                del self._entries[entry.name]

    def lease(self, adapter: Adapter | None, ids: tuple[str, ...]) -> AbstractContextManager[None]:
        """Hold an adapter, if there is one, for the samples of one request."""
        return nullcontext() if adapter is None else self._leases.lease(adapter, ids)

    def _missing(self, served: Served, prepared: PreparedAdapters) -> Iterator[AdapterEntry]:
        """Yield the adapters of a model that it does not have yet, and that have not been tried."""
        for entry in self.of_model(served.name):
            has_it = entry.adapter is not None and entry.adapter.served is served
            if not has_it and entry not in prepared:
                yield entry

    async def _prepared(self, entry: AdapterEntry, served: Served, others: Iterable[Adapter | AppError]) -> Adapter:
        """Raises: AppError: the adapter cannot be loaded into this model."""
        if isinstance(served, ServedEncoder) or served.adapters is None:
            raise InvalidRequest("The model takes no adapters.")
        # Those of the model that is replaced end with it.
        staying = [each for each in self.adapters if each.model != served.name]
        loaded = len(staying) + sum(isinstance(each, Adapter) for each in others)
        if loaded >= self.config.max_loaded:
            raise Conflict("As many adapters are loaded as may be (adapters.max_loaded).")
        return await self._read(entry, served)

    async def _read(self, entry: AdapterEntry, served: ServedModel) -> Adapter:
        """Load an adapter into the worker of a model that takes some.

        Raises: InvalidRequest: it cannot be used; EngineNotReady, EngineFailed.
        """
        if served.adapters is None:
            raise InvalidRequest("The model takes no adapters.")
        find = find_configured_files if entry.is_configured else find_adapter_files
        files = await asyncio.to_thread(find, entry.source, self.config.roots)
        facts = await served.adapters.load_adapter(files, self.config.max_rank)
        if entry.digest not in (None, facts.digest):
            served.adapters.unload_adapter(facts.digest)
            raise InvalidRequest("The adapter cannot be loaded: its files have changed since it was loaded.")
        entry.digest = facts.digest
        return Adapter(entry.name, files.folder, served, facts)
