"""An engine that fetches a registered model as `LocalEngine` does, and then echoes instead of loading it."""

from collections.abc import AsyncGenerator
from dataclasses import replace

from app.engine.base import EngineInfo, LoadProgress
from app.engine.echo import EchoEngine
from app.engine.model_source import FetchedModel, FetchModel
from app.errors import AppError, EngineFailed
from app.events import Event
from app.requests import GenerationRequest


class FetchingEngine(EchoEngine):
    """Starts by fetching; a model whose config.json says `fail` is loaded and completes nothing."""

    def __init__(self, model: str, uri: str, fetch: FetchModel) -> None:
        super().__init__(model=model)
        self._uri, self._fetch = uri, fetch
        self._fetched: FetchedModel | None = None
        self._failure: AppError | None = None
        self.progress: list[LoadProgress] = []

    @property
    def info(self) -> EngineInfo:
        revision = None if self._fetched is None else self._fetched.revision
        return replace(super().info, revision=revision)

    async def start(self) -> None:
        try:
            self._fetched = await self._fetch(self._uri, self.progress.append)
        except AppError as error:
            self._failure = EngineFailed(error.message, details=error.details)
        await super().start()

    async def wait_ready(self) -> None:
        if self._failure is not None:
            raise self._failure
        await super().wait_ready()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if self._fetched is not None and b"fail" in (self._fetched.folder / "config.json").read_bytes():
            raise EngineFailed("The model's logits are not finite.")
        async for event in super().stream(request):
            yield event

    async def close(self) -> None:
        await super().close()
        fetched, self._fetched = self._fetched, None
        if fetched is not None:
            await fetched.release()
