"""Interpreters that wait with their imports done, so that a worker that died is replaced within a second.

Importing torch and transformers is most of what a start takes.  A spare costs the memory of these imports, about
260 MB; forking them from a common parent would share most of it, but not survive OpenMP's and CUDA's threads.
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from app.ipc.interpreter import Interpreter
from app.ipc.private_folder import sweep

log = logging.getLogger(__name__)

_Key = frozenset[tuple[str, str]]
"""An environment that can be compared."""


class SpareInterpreters:
    """One spare for each environment in which a model was loaded, while any engine is open."""

    def __init__(self, *, cache: Path | None = None, enabled: bool = True) -> None:
        """Args:
        cache: folder for compiled code that survives the process.
        enabled: False starts every interpreter when it is needed.
        """
        self._cache = cache
        self._enabled = enabled
        self._wanted: dict[_Key, Mapping[str, str]] = {}
        self._spares: dict[_Key, Interpreter] = {}
        self._engines = 0

    async def open(self) -> None:
        """An engine begins; its `close` follows.  The first one removes what killed services have left."""
        self._engines += 1
        if self._engines == 1 and (swept := await asyncio.to_thread(sweep)):
            log.warning("removed %d folders of workers whose service was killed", swept)

    async def close(self) -> None:
        """An engine has ended; with the last one, the spares do too."""
        self._engines -= 1
        if not self._engines:
            spares, self._spares = self._spares, {}
            await asyncio.gather(*(spare.stop(0) for spare in spares.values()))

    async def take(self, environment: Mapping[str, str]) -> Interpreter:
        """Return the spare of an environment, or a new interpreter.

        Raises: OSError: it cannot be started.
        """
        key = frozenset(environment.items())
        self._wanted[key] = environment
        spare = self._spares.get(key)
        if spare is not None and not spare.is_usable:
            await self._spares.pop(key).stop(0)
        elif spare is not None and spare.has_imported:
            return self._spares.pop(key)
        # One that still imports does so at the lowest priority: where others use the processor, that takes minutes.
        return await Interpreter.spawn(environment, cache=self._cache)

    @property
    def ready(self) -> int:
        """How many wait with their imports done."""
        return sum(spare.is_usable and spare.has_imported for spare in self._spares.values())

    async def prepare(self) -> None:
        """Start the spares that are missing; a failure is logged, since nobody needs them yet."""
        for key, environment in tuple(self._wanted.items()):
            if not self._enabled or not self._engines:
                return
            if (found := self._spares.get(key)) is not None:
                if found.is_usable:
                    continue
                await self._spares.pop(key).stop(0)
            try:
                spare = await Interpreter.spawn(environment, cache=self._cache, spare=True)
            except OSError as error:
                log.warning("no spare interpreter could be started: %s", error.strerror)
                return
            # Meanwhile another engine may have started one, or the last one may have closed.
            if not self._engines or self._spares.setdefault(key, spare) is not spare:
                await spare.stop(0)
