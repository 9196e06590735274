"""The adapters that a model's worker has loaded, and what a worker that replaces it is told to load again."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from app.engine.adapter_source import AdapterFiles
from app.engine.worker_status import not_ready
from app.errors import EngineFailed, InvalidRequest
from app.ipc.messages import AdapterFailed, AdapterLoaded, LoadAdapter, UnloadAdapter
from app.ipc.supervisor import Supervisor
from app.types import EngineState

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _InUse:
    """An adapter that the worker has loaded, or will load again once it runs."""

    message: LoadAdapter
    last_load: int
    """The id of the newest load of it that the worker has answered."""
    users: int = 0
    """How often it was loaded: the same files may serve under several names."""
    failed: bool = False
    """Whether a worker could not load it again."""


class WorkerAdapters:
    """Loads adapters into a worker, by the digest of their weights.  Runs on the event loop."""

    def __init__(self, worker: Supervisor, numbers: Iterator[int]) -> None:
        """Args: numbers: of the messages to the worker; never the same one twice."""
        self._worker = worker
        self._numbers = numbers
        self._pending: dict[int, tuple[LoadAdapter, asyncio.Future[AdapterLoaded]]] = {}
        self._in_use: dict[str, _InUse] = {}
        self._reloading: dict[int, str] = {}

    async def load(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        """Load an adapter and return what it is.

        Raises: InvalidRequest: it cannot be used with this model.  EngineNotReady, EngineFailed.
        """
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        message = LoadAdapter(next(self._numbers), str(files.config), str(files.weights), max_rank)
        answer: asyncio.Future[AdapterLoaded] = asyncio.get_running_loop().create_future()
        self._pending[message.id] = message, answer
        self._worker.send(message)
        try:
            return await answer
        except asyncio.CancelledError:
            # Nobody will use it.  Where the worker has yet to answer, that is seen when it does.
            if not answer.cancelled() and answer.exception() is None:
                self.unload(answer.result().digest)
            raise

    def unload(self, digest: str) -> None:
        """Let go of an adapter that was loaded once; the last one frees its memory."""
        adapter = self._in_use[digest]
        adapter.users -= 1
        if not adapter.users:
            del self._in_use[digest]
            self._worker.send(UnloadAdapter(digest, adapter.last_load))

    def check(self, digest: str | None) -> None:
        """Raises: EngineFailed: the adapter could not be loaded again after the worker was replaced."""
        if digest is not None and (digest not in self._in_use or self._in_use[digest].failed):
            raise EngineFailed("This adapter was lost when the model's worker was replaced; load it again.")

    def on_ready(self) -> None:
        """Load all adapters again: the worker is a new one."""
        self._reloading.clear()
        for digest, adapter in self._in_use.items():
            adapter.failed = False
            number = next(self._numbers)
            self._reloading[number] = digest
            self._worker.send(LoadAdapter(number, *_files(adapter.message), adapter.message.max_rank, digest))

    def on_answer(self, message: AdapterLoaded | AdapterFailed) -> None:
        """Take the worker's answer to a load."""
        if (digest := self._reloading.pop(message.id, None)) is not None:
            self._on_reloaded(digest, message)
            return
        if (pending := self._pending.pop(message.id, None)) is None:
            return
        request, answer = pending
        if isinstance(message, AdapterLoaded):
            # At once, and not when the caller resumes: an unload of the same weights may come first.
            self._add(message, request)
            if answer.cancelled():
                self.unload(message.digest)
            else:
                answer.set_result(message)
        elif not answer.done():
            answer.set_exception(InvalidRequest(f"The adapter cannot be loaded: {message.message}."))

    def on_lost(self) -> None:
        """Fail every load that has not been answered."""
        for _, answer in self._pending.values():
            if not answer.done():
                answer.set_exception(EngineFailed("The model's worker failed while it loaded the adapter. Try again."))
        self._pending.clear()

    def _on_reloaded(self, digest: str, message: AdapterLoaded | AdapterFailed) -> None:
        adapter = self._in_use.get(digest)
        if isinstance(message, AdapterLoaded):
            if adapter is None:
                # It was unloaded before the worker had it.
                self._worker.send(UnloadAdapter(digest, message.id))
            else:
                adapter.last_load = message.id
        elif adapter is not None:
            adapter.failed = True
            log.error("an adapter could not be loaded again: %s", message.message)

    def _add(self, loaded: AdapterLoaded, message: LoadAdapter) -> None:
        adapter = self._in_use.setdefault(loaded.digest, _InUse(message, loaded.id))
        adapter.users += 1
        adapter.failed, adapter.last_load = False, loaded.id


def _files(message: LoadAdapter) -> tuple[str, str]:
    return message.config_file, message.weights_file
