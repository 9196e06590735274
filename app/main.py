"""The composition: builds every object of the service once, in the order in which data meets them.

`create_app` reads nothing but its settings and the files they name.
"""

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import anyio
from fastapi import FastAPI

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.access.bootstrap_key import bootstrap_key
from app.config import Settings
from app.engine.adapters import AdapterRegistry
from app.engine.base import EncoderEngine, Engine
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.encoder import LocalEncoder
from app.engine.host import ModelHost
from app.engine.local import LocalEngine
from app.engine.parsing.parsed_engine import ParsedEngine
from app.engine.persistent_cache import PersistentCacheEngine
from app.engine.served_model import AdapterEngine, SamplingDefaults, Served, ServedEncoder, ServedModel
from app.errors import ConfigError, ModelNotFound
from app.generation.embedding import EmbeddingService
from app.generation.metering import UsageRecorder
from app.generation.prompts import read_template
from app.generation.responses import MemoryResponseStore
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore, SessionStore
from app.ipc.spare_interpreters import SpareInterpreters
from app.langchain.chains import COMPLETION_VARIABLES, SYSTEM_VARIABLES, ModelChains
from app.langchain.embeddings import EngineEmbeddings
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redactor
from app.stores.memory_admission import MemoryAdmissionStore
from app.telemetry import Metrics, disable_foreign_tracing
from app.telemetry.metrics import Direction
from app.web.app_factory import build_app
from app.web.http.authentication import Keys
from app.web.http.dependencies import Container, Service
from app.web.http.rate_limits import FailedKeyLimiter

DEADLINE_MARGIN_SECONDS = 30.0
"""A worker has so much longer for a first token than the deadline, before it counts as stuck."""

REDACTION_PROCESSES = min(4, max(1, (os.cpu_count() or 1) // 2))
"""Most child processes that filter long texts."""
_LOG_TENANT = "inference log"
"""As whose the texts of the log take their turn among those of the tenants."""


def create_app(
    settings: Settings,
    *,
    engines: Mapping[str, Engine] | None = None,
    encoders: Mapping[str, EncoderEngine] | None = None,
    service: Service | None = None,
    keys: Keys | None = None,
    sessions: SessionStore | None = None,
) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args: each takes the place of what is built otherwise:
        engines: by public model name; the first serves requests that name no model, and all are loaded at start.
        encoders: the same for models that only embed; without a name a request gets the first of them.
        service: what the routes that generate call.
        keys: knows whose an API key is.
        sessions: where conversations are stored.
    Raises: ConfigError: a file that the settings name is missing or cannot be used.
    """
    disable_foreign_tracing(settings.langsmith)
    names = _model_names(settings, engines, encoders)
    metrics = Metrics(names)
    redactor = _redactor(settings)
    pool = RedactionPool(redactor, REDACTION_PROCESSES)
    filters = _Filters(settings, redactor, pool, metrics)
    access = _access(settings, filters, metrics)
    build = partial(
        _build_model,
        engines=engines,
        encoders=encoders,
        settings=settings,
        filters=filters,
        metrics=metrics,
        access=access,
        interpreters=SpareInterpreters(
            cache=settings.app.data_dir.absolute() / "compiled", enabled=settings.model.spare_worker
        ),
    )
    host = ModelHost(build, default=names[0], adapters=AdapterRegistry(settings.adapters))
    for name in names:
        host.add(name)
    admission = AdmissionControl(MemoryAdmissionStore(), access.quotas, on_refusal=metrics.rate_limited)
    usage = _usage_recorder(settings, access)
    if sessions is None and settings.chat_history.enabled:
        sessions = MemorySessionStore(settings.chat_history)
    responses = MemoryResponseStore(settings.chat_history) if settings.chat_history.enabled else None
    generation: Service = service or GenerationService(
        host=host,
        input_filter=filters.of_input(),
        storage_filter=filters.of_storage() if settings.pii.enabled else None,
        sessions=sessions,
        metrics=metrics,
        admission=admission,
        usage=usage,
        waiting_seconds=settings.deadlines.waiting_seconds,
    )
    embeddings = EmbeddingService(
        host=host,
        input_filter=filters.of_input(),
        metrics=metrics,
        admission=admission,
        usage=usage,
        waiting_seconds=settings.deadlines.waiting_seconds,
    )
    _watch(metrics, host, sessions)
    container = Container(
        settings=settings,
        service=generation,
        embeddings=embeddings,
        host=host,
        sessions=sessions,
        responses=responses,
        keys=keys or access.authenticator,
        access=access,
        admission=admission,
        failed_keys=FailedKeyLimiter(settings.security.failed_keys_per_minute, on_refusal=metrics.rate_limited),
        metrics=metrics,
    )
    return build_app(container, lifespan=partial(_lifespan, pool=pool))


def _model_names(
    settings: Settings, engines: Mapping[str, Engine] | None, encoders: Mapping[str, EncoderEngine] | None
) -> list[str]:
    """Return the names of all models, the default one first.

    Raises: ConfigError: one is the name of two.
    """
    names = list(engines or [settings.model.public_name])
    encoder = settings.embeddings.public_name
    names += list(encoders if encoders is not None else [encoder] if encoder else [])
    if len(set(names)) < len(names):
        raise ConfigError(f"configuration: embeddings.model: {encoder} is the name of the chat model, too")
    return names


@asynccontextmanager
async def _lifespan(app: FastAPI, *, pool: RedactionPool) -> AsyncIterator[None]:
    container: Container = app.state.container
    async with anyio.create_task_group() as background:
        background.start_soon(container.metrics.watch_event_loop)
        try:
            await container.access.start()
            await container.host.start()
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await container.host.close()
                await container.access.close()
                await pool.close()
            background.cancel_scope.cancel()


def _build_model(
    name: str,
    *,
    engines: Mapping[str, Engine] | None,
    encoders: Mapping[str, EncoderEngine] | None,
    settings: Settings,
    filters: "_Filters",
    metrics: Metrics,
    access: AccessControl,
    interpreters: SpareInterpreters,
) -> Served:
    """Build everything that belongs to one model.

    Raises: ModelNotFound: nothing of this name is configured.
    """
    if name in (encoders if encoders is not None else (settings.embeddings.public_name or None,)):
        encoder = encoders[name] if encoders is not None else _encoder(settings, interpreters)
        return ServedEncoder(name=name, engine=encoder, embeddings=EngineEmbeddings(embedder=encoder, model=name))
    if name not in (engines or (settings.model.public_name,)):
        raise ModelNotFound("There is no such model.")
    engine = engines[name] if engines else _engine(settings, name, interpreters)
    embeddings = EngineEmbeddings(embedder=engine, model=name) if _embeds(settings, engine) else None
    adapters = engine if isinstance(engine, AdapterEngine) else None
    engine, cache = _wrap(engine, settings, filters, metrics, access)
    read = partial(read_template, settings.app.prompts_dir, model=name)
    return ServedModel(
        name=name,
        engine=engine,
        chain=ModelChains(
            engine,
            name,
            system=read("base_system", SYSTEM_VARIABLES, may_be_empty=True),
            completion=read("completion", COMPLETION_VARIABLES, default="{prompt}"),
        ),
        cache=cache,
        embeddings=embeddings,
        adapters=adapters,
        defaults=SamplingDefaults(
            max_tokens=settings.model.max_tokens,
            temperature=settings.model.temperature,
            openai_temperature=settings.openai.temperature,
        ),
    )


def _engine(settings: Settings, name: str, interpreters: SpareInterpreters) -> Engine:
    if settings.model.engine == "echo":
        return EchoEngine(model=name, context_length=settings.model.max_model_len or 8192)
    if settings.model.source == "local":
        _require_model("model.name", settings.model.name, "config.json")
    return LocalEngine(settings.model, settings.deadlines, interpreters=interpreters, **_supervision(settings))


def _encoder(settings: Settings, interpreters: SpareInterpreters) -> EncoderEngine:
    if settings.embeddings.source == "local":
        # Older releases of sentence-transformers put the transformer's own file into a folder below.
        _require_model("embeddings.model", settings.embeddings.model, "config.json", "modules.json")
    return LocalEncoder(settings.embeddings, settings.deadlines, interpreters=interpreters, **_supervision(settings))


def _embeds(settings: Settings, engine: Engine) -> TypeGuard[LocalEngine]:
    return isinstance(engine, LocalEngine) and settings.model.embeddings != "none"


def _require_model(key: str, folder: str, *files: str) -> None:
    """Raises: ConfigError: none of the files is there; the worker would find out too, seconds later."""
    if not any((Path(folder) / name).is_file() for name in files):
        raise ConfigError(f"configuration: {key}: the folder {folder} holds no model (no {files[0]})")


def _supervision(settings: Settings) -> dict[str, Any]:
    """Return the settings of a worker process that do not depend on what it does."""
    token = settings.hub_token
    return {
        "hub_token": token.get_secret_value() if token else None,
        "hang_seconds": settings.model.hang_seconds,
        # What a deadline allows must not count as stuck.
        "stall_seconds": max(
            settings.model.stall_seconds, settings.deadlines.first_token_seconds + DEADLINE_MARGIN_SECONDS
        ),
    }


def _wrap(
    engine: Engine, settings: Settings, filters: "_Filters", metrics: Metrics, access: AccessControl
) -> tuple[Engine, CachedEngine | None]:
    """Put the parser around the engine, the output filter around both, and the caches around all.

    So the filter sees messages and not the model's marks, and nothing unfiltered is stored.
    """
    engine, scope = filters.around(ParsedEngine(engine))
    if not settings.cache.enabled:
        return engine, None
    if settings.cache.persistent:
        mask = filters.of_storage().mask if settings.pii.enabled and settings.pii.output == "off" else None
        engine = PersistentCacheEngine(engine, access.response_cache, scope=scope, mask=mask)
    cache = CachedEngine(engine, settings.cache, scope=scope, metrics=metrics)
    return cache, cache


def _access(settings: Settings, filters: "_Filters", metrics: Metrics) -> AccessControl:
    configured = settings.security.api_key
    return AccessControl(
        settings,
        configured_key=configured.get_secret_value() if configured else None,
        bootstrap_key=None if configured else bootstrap_key(settings.app.data_dir),
        mask=partial(filters.of_storage().mask, _LOG_TENANT),
        on_drop=metrics.log_rows_dropped,
    )


def _usage_recorder(settings: Settings, access: AccessControl) -> UsageRecorder:
    return UsageRecorder(
        log=access.log,
        cached_prompt=settings.quota.cached_prompt,
        cached_completion=settings.quota.cached_completion,
        store_text=settings.logging.store_text,
    )


def _redactor(settings: Settings) -> Redactor:
    pii = settings.pii
    # Logged text is masked even with `pii.enabled: false`.
    kinds = [PiiKind(name) for name in pii.entities] if pii.enabled else list(PiiKind)
    try:
        return Redactor(kinds, phone_regions=pii.phone_regions)
    except ValueError as error:
        raise ConfigError(f"configuration: pii.phone_regions: {error}") from None


class _Filters:
    """Builds the filters of personal data, which share one pool; what is switched off is None or left out."""

    def __init__(self, settings: Settings, redactor: Redactor, pool: RedactionPool, metrics: Metrics) -> None:
        self._pii = settings.pii
        self._redactor = redactor
        self._pool = pool
        self._metrics = metrics

    def of_input(self) -> InputFilter | None:
        if not self._pii.enabled or self._pii.input == "off":
            return None
        count = partial(self._count, "input")
        return InputFilter(self._redactor, self._pii.input, count, pool=self._pool)

    def of_storage(self) -> InputFilter:
        """Return what masks stored and logged text, whatever `pii.input` and `pii.output` say."""
        return InputFilter(self._redactor, "mask", lambda kind, count: None, pool=self._pool)

    def around(self, engine: Engine) -> tuple[Engine, str]:
        """Put the output filter around an engine.  Returns: the engine, the policy's name for the keys of caches."""
        if not self._pii.enabled or self._pii.output == "off":
            return engine, "unfiltered"
        filtered = FilteredEngine(engine, self._redactor, partial(self._count, "output"), pool=self._pool)
        return filtered, self._redactor.fingerprint

    def _count(self, direction: Direction, kind: PiiKind, count: int) -> None:
        self._metrics.pii(kind, direction, count)


def _watch(metrics: Metrics, host: ModelHost, sessions: SessionStore | None) -> None:
    def total(figure: Callable[[Served], int]) -> Callable[[], float]:
        return lambda: sum(map(figure, host.models))

    metrics.watch(
        requests_running=total(lambda model: model.engine.status().running),
        requests_waiting=total(lambda model: model.engine.status().waiting),
        sessions=lambda: sessions.count() if sessions else 0,
        model_loaded=lambda: host.can_serve,
        engine_restarts=total(lambda model: model.engine.status().restarts),
    )
