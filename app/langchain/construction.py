"""Construction and closing of LangChain's classes without an engine at hand: `from_service` and `from_model_id`.

An object made so owns its engine, which closes with it; one made of an engine leaves that to whoever made the engine.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from pydantic import SecretStr

from app.langchain.engine_thread import ThreadedEngine
from app.langchain.loading import (
    ALIASES,
    CALL_ARGUMENTS,
    connect,
    load,
    model_settings,
    pipeline_arguments,
    sampling_arguments,
)

_LANGCHAIN = frozenset(["callbacks", "metadata", "name", "tags", "verbose"])
"""Fields of LangChain's own that every model has."""
_SAMPLING = CALL_ARGUMENTS | ALIASES.keys() | {"do_sample"}


class ClosesEngine(ABC):
    """`close`, `with` and `async with` for a model that may own its engine."""

    @abstractmethod
    def _owned_engine(self) -> ThreadedEngine | None:
        """Return the engine that was made for this object; None where there is none."""

    def close(self) -> None:
        """Close the engine that was made for this object, and wait for that; a second call does nothing."""
        if (engine := self._owned_engine()) is not None:
            engine.close()

    async def aclose(self) -> None:
        """Close as `close` does, without holding up the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def service_fields(
    base_url: str,
    key: str | SecretStr | None,
    *,
    model: str | None,
    model_id: str | None,
    timeout_seconds: float,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of a pipeline whose model is that of a running service.

    Raises:
        ValueError: an argument that nothing would honour.
        AppError: no service answers, it refuses the key, or it has no such model.
    """
    known, rest = _split(others)
    arguments = sampling_arguments(rest)  # refuses what is left
    engine = connect(base_url, key, model=model, model_id=model_id, timeout_seconds=timeout_seconds)
    return {**known, **_fields(engine, engine.engine.model, arguments)}


def model_fields(
    model_id: str | None,
    *,
    task: str,
    backend: str,
    device: Any,
    device_map: Any,
    model_kwargs: Mapping[str, Any] | None,
    pipeline_kwargs: Mapping[str, Any] | None,
    batch_size: int | None,
    model: str | None,
    filters: bool,
    token: str | SecretStr | None,
    others: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the fields of a pipeline whose model is loaded for it.

    Raises: ValueError: an argument that nothing would honour. EngineFailed: the model cannot be loaded.
    """
    known, rest = _split(others)
    own = {name: rest.pop(name) for name in tuple(rest) if name in _SAMPLING}
    if batch_size is not None:
        rest["max_batch_size"] = batch_size
    settings = model_settings(task, backend, device, device_map, model_kwargs, rest)
    arguments = {**pipeline_arguments(pipeline_kwargs), **sampling_arguments(own)}
    engine = load(model_id, model=model, filters=filters, token=token, settings=settings)
    return {**known, **_fields(engine, model_id or model, arguments)}


def _split(others: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return LangChain's own fields, and the other arguments."""
    known = {name: value for name, value in others.items() if name in _LANGCHAIN}
    return known, {name: value for name, value in others.items() if name not in _LANGCHAIN}


def _fields(engine: ThreadedEngine, model: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"engine": engine, "loop": engine.loop, "model_id": model, "arguments": dict(arguments)}
