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
    users: int = 1
    """How often it was loaded: the same files may serve under several names."""
    failed: bool = False
    """Whether a worker could not load it again."""


class WorkerAdapters:
    """Loads adapters into a worker, by the digest of their weights.  Runs on the event loop."""

    def __init__(self, worker: Supervisor, numbers: Iterator[int]) -> None:
        """Args: numbers: of the messages to the worker; never the same one twice."""
        self._worker = worker
        self._numbers = numbers
        self._pending: dict[int, asyncio.Future[AdapterLoaded]] = {}
        self._in_use: dict[str, _InUse] = {}
        self._reloading: dict[int, str] = {}

    async def load(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        """Load an adapter and return what it is.

        Raises: InvalidRequest: it cannot be used with this model.  EngineNotReady, EngineFailed.
        """
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        message = LoadAdapter(next(self._numbers), str(files.config), str(files.weights), max_rank)
        answer = self._pending[message.id] = asyncio.get_running_loop().create_future()
        self._worker.send(message)
        try:
            loaded: AdapterLoaded = await answer
        except asyncio.CancelledError:
            # Nobody will use it; what the worker answers is dropped, and the adapter with it.
            self._pending[message.id] = answer = asyncio.get_running_loop().create_future()
            answer.add_done_callback(self._drop)
            raise
        self._add(loaded, message)
        return loaded

    def unload(self, digest: str) -> None:
        """Let go of an adapter that was loaded once; the last one frees its memory."""
        adapter = self._in_use[digest]
        adapter.users -= 1
        if not adapter.users:
            del self._in_use[digest]
            self._worker.send(UnloadAdapter(digest))

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
            if isinstance(message, AdapterFailed) and digest in self._in_use:
                self._in_use[digest].failed = True
                log.error("an adapter could not be loaded again: %s", message.message)
            return
        answer = self._pending.pop(message.id, None)
        if answer is None or answer.done():
            return
        if isinstance(message, AdapterLoaded):
            answer.set_result(message)
        else:
            answer.set_exception(InvalidRequest(f"The adapter cannot be loaded: {message.message}."))

    def on_lost(self) -> None:
        """Fail every load that has not been answered."""
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(EngineFailed("The model's worker failed while it loaded the adapter. Try again."))
        self._pending.clear()

    def _add(self, loaded: AdapterLoaded, message: LoadAdapter) -> None:
        if (adapter := self._in_use.get(loaded.digest)) is None:
            self._in_use[loaded.digest] = _InUse(message)
        else:
            adapter.users += 1
            adapter.failed = False

    def _drop(self, answer: "asyncio.Future[AdapterLoaded]") -> None:
        if answer.cancelled() or answer.exception() is not None:
            return
        if (digest := answer.result().digest) not in self._in_use:
            self._worker.send(UnloadAdapter(digest))


def _files(message: LoadAdapter) -> tuple[str, str]:
    return message.config_file, message.weights_file
