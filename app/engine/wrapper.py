"""An engine around an engine: what output filter and caches have in common."""

from collections.abc import AsyncGenerator

from app.engine.base import Chunk, Engine, EngineInfo, EngineStatus, GenerationRequest, Tokenizer


class EngineWrapper:
    """Is in everything the inner engine; a subclass changes what it is there for."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    @property
    def info(self) -> EngineInfo:
        return self._inner.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._inner.tokenizer

    def status(self) -> EngineStatus:
        return self._inner.status()

    async def start(self) -> None:
        await self._inner.start()

    async def wait_ready(self) -> None:
        await self._inner.wait_ready()

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return self._inner.stream(request)

    async def abort(self, request_id: str) -> None:
        await self._inner.abort(request_id)

    async def close(self) -> None:
        await self._inner.close()
