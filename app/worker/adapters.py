"""The LoRA adapters of one loaded model: read when the API process says so, and handed to the runner.

Files are read in a thread, since the model's requests must not wait for them; everything else is done by the worker's
own thread.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from app.ipc.messages import AdapterFailed, AdapterLoaded, LoadAdapter, Submit, UnloadAdapter
from app.worker.execution.lora import LoraAdapter
from app.worker.loading.adapter_files import AdapterTarget, read_adapter
from app.worker.loading.model_files import LoadError, one_line

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 400
"""Of the line that says why an adapter cannot be loaded."""


class AdapterRunner(Protocol):
    """The part of a runner that takes adapters."""

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """Let requests use an adapter."""

    def remove_adapter(self, digest: str) -> None:
        """End what still uses an adapter, and let go of its weights."""


Read = tuple[LoraAdapter, str | None] | AdapterFailed
"""An adapter and the model that it says it was made for, or why it cannot be used."""


class AdapterLoader:
    """Answers the messages about adapters, in their order."""

    def __init__(self, target: AdapterTarget, runner: AdapterRunner) -> None:
        self._target = target
        self._runner = runner
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._reads: deque[tuple[LoadAdapter, Future[Read]]] = deque()
        self._last_loads: dict[str, int] = {}
        """The id of the newest load of each adapter that the runner has, by its digest."""
        self._unwanted: set[int] = set()
        """Loads whose adapter was unloaded while it was read again."""
        self._held_back: list[Submit] = []

    @property
    def busy(self) -> bool:
        """Return whether an adapter is being read, or has been and waits for `finished`."""
        return bool(self._reads)

    def hold_back(self, request: Submit) -> bool:
        """Keep a request whose adapter a new worker is still reading again; return whether it is one."""
        waits = self._is_reading(request.adapter)
        if waits:
            self._held_back.append(request)
        return waits

    def released(self) -> list[Submit]:
        """Return the requests that were kept, and whose adapter has been read."""
        ready = [each for each in self._held_back if not self._is_reading(each.adapter)]
        self._held_back = [each for each in self._held_back if each not in ready]
        return ready

    def give_up(self, request_id: int) -> bool:
        """Drop a request that was kept; return whether it was."""
        before = len(self._held_back)
        self._held_back = [each for each in self._held_back if each.id != request_id]
        return len(self._held_back) < before

    def begin(self, message: LoadAdapter) -> None:
        """Begin to read an adapter; `finished` has the answer."""
        self._reads.append((message, self._reader.submit(self._read, message)))

    def finished(self) -> Iterator[AdapterLoaded | AdapterFailed]:
        """Hand what has been read to the runner, and yield the answers."""
        while self._reads and self._reads[0][1].done():
            message, read = self._reads.popleft()
            yield self._answer(message, read.result())

    def unload(self, message: UnloadAdapter) -> None:
        """End what still uses an adapter, and free its memory; a load that the sender did not know of keeps it."""
        self._unwanted.update(each.id for each, _ in self._reads if each.digest == message.digest)
        if self._last_loads.get(message.digest, message.last_load) <= message.last_load:
            self._last_loads.pop(message.digest, None)
            self._runner.remove_adapter(message.digest)

    def _is_reading(self, digest: str | None) -> bool:
        return digest is not None and any(message.digest == digest for message, _ in self._reads)

    def _answer(self, message: LoadAdapter, read: Read) -> AdapterLoaded | AdapterFailed:
        if isinstance(read, AdapterFailed):
            return read
        adapter, base = read
        if message.digest not in (None, adapter.digest):
            return AdapterFailed(message.id, "its files have changed since it was loaded")
        if message.id in self._unwanted:
            self._unwanted.remove(message.id)
            return AdapterFailed(message.id, "it was unloaded")
        if adapter.digest not in self._last_loads:
            # The same weights once more would be in memory twice.
            self._runner.add_adapter(adapter)
        self._last_loads[adapter.digest] = message.id
        return AdapterLoaded(message.id, adapter.digest, adapter.rank, adapter.parameters, base)

    def _read(self, message: LoadAdapter) -> Read:
        try:
            return read_adapter(
                Path(message.config_file), Path(message.weights_file), self._target, max_rank=message.max_rank
            )
        except LoadError as error:
            return AdapterFailed(message.id, one_line(error, MAX_REASON_CHARS))
        except (torch.OutOfMemoryError, MemoryError):
            return AdapterFailed(message.id, "it does not fit into memory")
        except Exception as error:
            log.exception("an adapter could not be loaded")
            return AdapterFailed(message.id, f"it cannot be read ({type(error).__name__})")
