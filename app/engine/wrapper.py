"""Forwards every call of an engine to an inner one."""

from collections.abc import AsyncGenerator, Sequence

from app.engine.base import Engine, EngineInfo, EngineStatus, PreparedPrompt
from app.events import Event
from app.requests import GenerationRequest


class EngineWrapper:
    """Forwards every call to the inner engine; subclasses override what they change."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    @property
    def info(self) -> EngineInfo:
        return self._inner.info

    def status(self) -> EngineStatus:
        return self._inner.status()

    async def start(self) -> None:
        await self._inner.start()

    async def wait_ready(self) -> None:
        await self._inner.wait_ready()

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        return await self._inner.prepare(request)

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool = False) -> str:
        return await self._inner.detokenize(token_ids, control_tokens=control_tokens)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return await self._inner.token_texts(token_ids)

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        return self._inner.has_control_tokens(prompt_ids)

    def hidden_token(self, name: str) -> int | None:
        return self._inner.hidden_token(name)

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        return self._inner.prompt_end(prompt_ids)

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        return self._inner.stream(request)

    async def abort(self, request_id: str) -> None:
        await self._inner.abort(request_id)

    async def close(self) -> None:
        await self._inner.close()
