"""Follows the aliases of a registry: where one moves to another version, that version is loaded, tried and takes over.

A version that fails stays out, and the old one serves on.  `model_loader.py` switches from one to the other.
"""

import asyncio
import logging

from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader, Probe
from app.engine.model_source import LoadSpec
from app.engine.registered_models import RegisteredModels
from app.errors import AppError, ModelLoadFailed
from app.registry.model_uri import ModelUri, parse_model_uri
from app.registry.version import ModelVersion

log = logging.getLogger(__name__)


class AliasFollower:
    """Looks after the models that were named by an alias or a stage; lives as long as the application."""

    def __init__(
        self,
        models: RegisteredModels,
        loader: ModelLoader,
        host: ModelHost,
        *,
        poll_seconds: float,
        probe: Probe,
    ) -> None:
        """Args:
        poll_seconds: how often each name is looked up; 0 never does.
        probe: what a new version has to pass.
        """
        self._models = models
        self._loader = loader
        self._host = host
        self._poll_seconds = poll_seconds
        self._probe = probe
        self._problems: dict[str, str] = {}
        """What was last logged of each model, so that it is logged once."""
        self._polled: set[str] = set()
        """Models that are being looked after now; a download takes longer than a poll."""

    async def watch(self) -> None:
        """Follow all aliases until cancelled."""
        if not self._poll_seconds:
            return
        async with asyncio.TaskGroup() as polls:
            while True:
                await asyncio.sleep(self._poll_seconds)
                for name, spec in tuple(self._loader.loaded.items()):
                    if spec.config.source == "mlflow" and name not in self._polled and name not in self._loader.loads:
                        self._polled.add(name)
                        polls.create_task(self._poll(spec))

    async def _poll(self, spec: LoadSpec) -> None:
        try:
            uri = parse_model_uri(spec.config.name)
            serving = self._serving(spec.name)
            if serving is not None:
                await self._models.confirm(uri, serving)
                if uri.moves:
                    await self._follow(spec, uri, serving)
            self._problems.pop(spec.name, None)
        except AppError as error:
            if self._problems.get(spec.name) != error.message:
                self._problems[spec.name] = error.message
                log.warning("%s: %s It is tried again.", spec.name, error.message)
        except Exception:
            log.exception("%s could not be followed", spec.name)
        finally:
            self._polled.discard(spec.name)

    async def _follow(self, spec: LoadSpec, uri: ModelUri, serving: ModelVersion) -> None:
        """Raises: AppError: it could not be done now."""
        number = await self._models.find_version(uri)
        if number == self._models.refused(uri):
            return
        await self._models.clear_refused(uri)
        if number == serving.version:
            return
        log.info("%s is version %s now, in place of %s", uri, number, serving.version)
        try:
            await self._loader.replace(spec, probe=self._probe).wait()
        except ModelLoadFailed as error:
            log.warning("version %s of %s stays out, and %s serves on", number, uri, serving.version)
            await self._models.refuse(uri, number, error.message)
            return
        if (replaced := self._serving(spec.name)) is not None:
            log.info("version %s of %s has taken over", replaced.version, uri)
            await self._models.confirm(uri, replaced)

    def _serving(self, name: str) -> ModelVersion | None:
        """Return the version that a model was loaded from; None if it is not loaded."""
        try:
            return self._models.of(self._host.find(name).engine.info.revision)
        except AppError:
            return None
