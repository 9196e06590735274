"""The adapters that requests can name: loaded by name, leased by requests, drained and unloaded."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from msgspec import structs

from app.config import AdaptersConfig
from app.engine.adapter_source import find_adapter_files
from app.engine.served_model import ServedModel
from app.errors import AdapterNotFound, Conflict, InvalidRequest
from app.ipc.messages import AdapterLoaded
from app.requests import GenerationRequest


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter behind its name."""

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


class AdapterRegistry:
    """Holds the loaded adapters by their names; lives as long as the application."""

    def __init__(self, config: AdaptersConfig | None = None) -> None:
        self.config = config or AdaptersConfig()
        self._adapters: dict[str, Adapter] = {}
        self._loading: set[str] = set()
        self._leases: dict[str, Adapter] = {}
        """Request id -> adapter, of each sample of each live request."""
        self._leases_per_adapter: Counter[Adapter] = Counter()
        self._released = asyncio.Event()
        """Set, and replaced, each time an adapter has lost its last lease."""

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Return all adapters, in the order in which they were loaded."""
        return tuple(self._adapters.values())

    def get(self, name: str | None) -> Adapter | None:
        """Return an adapter by its name; None where there is none."""
        return None if name is None else self._adapters.get(name)

    def model_of(self, name: str) -> str:
        """Return the name of the model that an adapter is for.  Raises: KeyError: it is not loaded."""
        return self._adapters[name].model

    def named_by(self, request: GenerationRequest) -> Adapter | None:
        """Return the adapter that a request names, as its `adapter` or as its `model`.

        Raises: AdapterNotFound: `adapter` is not loaded; InvalidRequest: it is for another model than `model`.
        """
        if request.adapter is None:
            return self.get(request.model)
        if (adapter := self.get(request.adapter)) is None:
            raise AdapterNotFound("This adapter is not loaded. GET /v1/models lists those that are.")
        if request.model not in (None, adapter.name, adapter.model):
            raise InvalidRequest.of_field("adapter", "is for another model than the one that this request names")
        return adapter

    def resolve(self, request: GenerationRequest) -> GenerationRequest:
        """Return a request with the adapter that it names, by name and by digest.

        Raises: as `named_by`.
        """
        adapter = self.named_by(request)
        if adapter is None:
            return request
        return structs.replace(request, adapter=adapter.name, adapter_digest=adapter.facts.digest)

    async def load(self, name: str, source: str, served: ServedModel) -> Adapter:
        """Load an adapter of a model under a name of its own.

        Raises: InvalidRequest: it cannot be used, or the model takes none.  Conflict: the name is taken, or there are
            as many as there may be.  EngineNotReady, EngineFailed.
        """
        if served.adapters is None:
            raise InvalidRequest.of_field("model", "names a model that takes no adapters")
        if name in self._adapters or name in self._loading:
            raise Conflict("An adapter of this name is loaded already; unload it first.")
        if len(self._adapters) + len(self._loading) >= self.config.max_loaded:
            raise Conflict("As many adapters are loaded as may be (adapters.max_loaded); unload one first.")
        self._loading.add(name)
        try:
            files = await asyncio.to_thread(find_adapter_files, source, self.config.roots)
            facts = await served.adapters.load_adapter(files, self.config.max_rank)
            adapter = self._adapters[name] = Adapter(name, files.folder, served, facts)
        finally:
            self._loading.remove(name)
        return adapter

    async def unload(self, name: str) -> Adapter:
        """Refuse new requests for an adapter, let the live ones finish, abort the rest, and free its memory.

        Raises: AdapterNotFound: it is not loaded.
        """
        adapter = self._adapters.pop(name, None)
        if adapter is None or adapter.served.adapters is None:
            raise AdapterNotFound("This adapter is not loaded.")
        try:
            if not await self._released_within(self.config.grace_seconds, adapter):
                for request_id in [each for each, leased in self._leases.items() if leased is adapter]:
                    await adapter.served.engine.abort(request_id)
        finally:
            adapter.served.adapters.unload_adapter(adapter.facts.digest)
        return adapter

    def forget_model(self, served: object) -> None:
        """Drop the adapters of a model that is unloaded, and whose worker ends with them."""
        for adapter in self.adapters:
            if adapter.served is served:
                del self._adapters[adapter.name]

    @contextmanager
    def lease(self, adapter: Adapter | None, ids: tuple[str, ...]) -> Iterator[None]:
        """Hold an adapter, if there is one, for the samples of one request."""
        if adapter is None:
            yield
            return
        self._leases.update(dict.fromkeys(ids, adapter))
        self._leases_per_adapter[adapter] += 1
        try:
            yield
        finally:
            for each in ids:
                del self._leases[each]
            self._leases_per_adapter[adapter] -= 1
            if not self._leases_per_adapter[adapter]:
                del self._leases_per_adapter[adapter]
                self._released.set()
                self._released = asyncio.Event()

    async def _released_within(self, seconds: float, adapter: Adapter) -> bool:
        """Wait until an adapter has no lease left; return False when the time is over first."""
        try:
            async with asyncio.timeout(seconds):
                while adapter in self._leases_per_adapter:
                    await self._released.wait()
        except TimeoutError:
            return adapter not in self._leases_per_adapter
        return True
