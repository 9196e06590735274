"""The models of a registry as the service loads them: which version is fetched, in use, or no longer needed."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from app.engine.base import LoadProgress
from app.engine.model_source import FetchedModel, Report
from app.errors import ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.alias_history import AliasHistory
from app.registry.download import Progress
from app.registry.model_store import ModelStore
from app.registry.model_uri import ModelUri, parse_model_uri
from app.registry.version import ModelVersion

log = logging.getLogger(__name__)


class RegisteredModels:
    """Fetches registered models for the workers; lives as long as the application."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._versions: dict[str, ModelVersion] = {}
        """What has been fetched, by its revision."""
        self._uses: Counter[str] = Counter()
        self._discarded: set[str] = set()
        """Revisions whose files go with their last use."""
        self._refused: dict[ModelUri, str] = {}

    async def fetch(self, uri: str, report: Report) -> FetchedModel:
        """Fetch the version that a name means now, as a `FetchModel` does.

        Where an alias or stage means a version that failed, or the registry cannot be reached, it is the last version
        that served.

        Raises: ModelNotFound, ModelRefused, RegistryUnavailable: it cannot be loaded.
        """
        try:
            version = await self._choose(parse_model_uri(uri))
            folder, version = await self._store.fetch(version, partial(_report, report))
        except ValueError as error:
            raise ModelRefused(f"The model cannot be loaded: its name {error}.") from None
        except ModelNotFound as error:
            reason = f"The model cannot be loaded: {_continued(error.message)}"
            raise ModelNotFound(reason, details={"reason": "not_found"}) from None
        except (ModelRefused, RegistryUnavailable) as error:
            raise type(error)(f"The model cannot be loaded: {_continued(error.message)}") from None
        # With the name: a version that was copied to another model may have the same number, and has the same files.
        revision = f"{version.name}/{version.version}@{version.digest}"
        # Found by a number, it may still be the one that an alias means.
        known = self._versions.get(revision)
        self._versions[revision] = replace(version, alias=version.alias or (known.alias if known else None))
        self._uses[revision] += 1
        return FetchedModel(folder=folder, revision=revision, release=partial(self._release, revision))

    async def find_version(self, uri: ModelUri) -> str:
        """Return the number of the version that a name means now.  Raises: as `MlflowClient.describe`."""
        return await self._store.find_version(uri)

    def of(self, revision: str | None) -> ModelVersion | None:
        """Return the version that a model with this revision was loaded from; None if it is not from here."""
        return None if revision is None else self._versions.get(revision)

    def facts(self, revision: str | None) -> Mapping[str, Any] | None:
        """Return what the registry says of a loaded model, and which newer version stays out."""
        version = self.of(revision)
        if version is None:
            return None
        refused = next((found for uri, found in self._refused.items() if _means(uri, version)), None)
        return version.as_dict() | {"refused_version": refused}

    def refused(self, uri: ModelUri) -> str | None:
        """Return the number of the version that failed when this name came to mean it."""
        return self._refused.get(uri)

    async def confirm(self, uri: ModelUri, version: ModelVersion) -> None:
        """Note that a version serves under a name, and remove the files of the one before it once nobody needs them."""
        history = await self._store.history(uri)
        if history.refused is not None and history.refused != version.version:
            self._refused.setdefault(uri, history.refused)
        if history.serving == version:
            return
        await self._store.record(uri, AliasHistory(serving=version, refused=history.refused, reason=history.reason))
        before = history.serving
        if before is not None and (before.version, before.digest) != (version.version, version.digest):
            await self._discard(before)

    async def refuse(self, uri: ModelUri, number: str, reason: str) -> None:
        """Note that a version has failed: it is not tried again, and its files are removed."""
        history = await self._store.history(uri)
        self._refused[uri] = number
        await self._store.record(uri, AliasHistory(serving=history.serving, refused=number, reason=reason))
        await self._discard(ModelVersion(name=uri.name, version=number))

    async def clear_refused(self, uri: ModelUri) -> None:
        """Note that a name means another version than the one that failed; should it come back, it is tried again."""
        if self._refused.pop(uri, None) is not None:
            history = await self._store.history(uri)
            await self._store.record(uri, AliasHistory(serving=history.serving))

    async def _choose(self, uri: ModelUri) -> ModelVersion:
        history = await self._store.history(uri)
        try:
            version = await self._store.describe(uri)
        except RegistryUnavailable as error:
            if history.serving is None:
                raise
            log.warning("%s Version %s of %s serves, as it did last.", error.message, history.serving.version, uri)
            return history.serving
        if history.serving is not None and history.refused == version.version:
            log.warning("version %s of %s has failed before and stays out: %s", version.version, uri, history.reason)
            return history.serving
        return version

    async def _release(self, revision: str) -> None:
        self._uses[revision] -= 1
        if not self._uses[revision] and revision in self._discarded:
            self._discarded.discard(revision)
            await self._discard(self._versions[revision])

    async def _discard(self, version: ModelVersion) -> None:
        """Remove the files of a version, now or with their last use."""

        def is_used() -> bool:
            used = [
                revision
                for revision, known in self._versions.items()
                if (known.name, known.version) == (version.name, version.version) and self._uses[revision]
            ]
            self._discarded.update(used)
            return bool(used)

        # Asked again then: whoever is fetching them now uses them as soon as it has them.
        if not is_used():
            await self._store.remove(version, is_used=is_used)


def _means(uri: ModelUri, version: ModelVersion) -> bool:
    return uri.name == version.name and uri.value in (version.alias, version.stage)


def _report(report: Report, progress: Progress) -> None:
    report(LoadProgress("download", progress.bytes_done, progress.bytes_total))


def _continued(sentence: str) -> str:
    """Return a sentence as it stands behind a colon."""
    return sentence if sentence.startswith("ML") else sentence[:1].lower() + sentence[1:]
