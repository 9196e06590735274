"""The composition: builds every object of the service once, in the order in which data meets them.

`create_app` reads nothing but its settings and the files they name.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
from fastapi import FastAPI

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.access.bootstrap_key import bootstrap_key
from app.config import Settings
from app.engine.base import Engine
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.host import ModelHost
from app.engine.local import LocalEngine
from app.engine.persistent_cache import PersistentCacheEngine
from app.engine.served_model import SamplingDefaults, ServedModel
from app.errors import ConfigError, ModelNotFound
from app.generation.metering import UsageRecorder
from app.generation.prompts import read_template
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore, SessionStore
from app.ipc.spare_interpreters import SpareInterpreters
from app.langchain.chains import COMPLETION_VARIABLES, SYSTEM_VARIABLES, ModelChains
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.redactor import PiiKind, Redactor
from app.stores.memory_admission import MemoryAdmissionStore
from app.telemetry import Metrics, disable_foreign_tracing
from app.web.app_factory import build_app
from app.web.http.authentication import Keys
from app.web.http.dependencies import Container, Service
from app.web.http.rate_limits import FailedKeyLimiter

DEADLINE_MARGIN_SECONDS = 30.0
"""A worker has so much longer for a first token than the deadline, before it counts as stuck."""


def create_app(
    settings: Settings,
    *,
    engines: Mapping[str, Engine] | None = None,
    service: Service | None = None,
    keys: Keys | None = None,
    sessions: SessionStore | None = None,
) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args: each takes the place of what is built otherwise:
        engines: by public model name; the first serves requests that name no model, and all are loaded at start.
        service: what the routes call.
        keys: knows whose an API key is.
        sessions: where conversations are stored.
    Raises: ConfigError: a file that the settings name is missing or cannot be used.
    """
    disable_foreign_tracing(settings.langsmith)
    names = list(engines or [settings.model.public_name])
    metrics = Metrics(names)
    redactor = _redactor(settings)
    access = _access(settings, redactor, metrics)
    build = partial(
        _build_model,
        engines=engines,
        settings=settings,
        redactor=redactor,
        metrics=metrics,
        access=access,
        interpreters=SpareInterpreters(
            cache=settings.app.data_dir.absolute() / "compiled", enabled=settings.model.spare_worker
        ),
    )
    host = ModelHost(build, default=names[0])
    for name in names:
        host.add(name)
    limited = settings.rate_limit.enabled
    admission = AdmissionControl(
        MemoryAdmissionStore(), access.quotas, enabled=limited, on_refusal=metrics.rate_limited
    )
    if sessions is None and settings.chat_history.enabled:
        sessions = MemorySessionStore(settings.chat_history)
    generation: Service = service or GenerationService(
        host=host,
        input_filter=_input_filter(settings, redactor, metrics),
        storage_filter=_storage_filter(redactor) if redactor else None,
        sessions=sessions,
        metrics=metrics,
        admission=admission,
        usage=_usage_recorder(settings, access),
        waiting_seconds=settings.deadlines.waiting_seconds,
    )
    _watch(metrics, host, sessions)
    container = Container(
        settings=settings,
        service=generation,
        host=host,
        sessions=sessions,
        keys=keys or access.authenticator,
        access=access,
        admission=admission,
        failed_keys=FailedKeyLimiter(settings.security.failed_keys_per_minute, on_refusal=metrics.rate_limited),
        metrics=metrics,
    )
    return build_app(container, lifespan=_lifespan)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
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
            background.cancel_scope.cancel()


def _build_model(
    name: str,
    *,
    engines: Mapping[str, Engine] | None,
    settings: Settings,
    redactor: Redactor | None,
    metrics: Metrics,
    access: AccessControl,
    interpreters: SpareInterpreters,
) -> ServedModel:
    """Build everything that belongs to one model.

    Raises: ModelNotFound: nothing of this name is configured.
    """
    if name not in (engines or (settings.model.public_name,)):
        raise ModelNotFound("There is no such model.")
    engine = engines[name] if engines else _engine(settings, name, interpreters)
    engine, cache = _wrap(engine, settings, redactor, metrics, access)
    read = partial(read_template, settings.app.prompts_dir, model=name)
    return ServedModel(
        name=name,
        engine=engine,
        chain=ModelChains(
            engine,
            name,
            system=read("base_system", SYSTEM_VARIABLES),
            completion=read("completion", COMPLETION_VARIABLES, default="{prompt}"),
        ),
        cache=cache,
        defaults=SamplingDefaults(
            max_tokens=settings.model.max_tokens,
            temperature=settings.model.temperature,
            openai_temperature=settings.openai.temperature,
        ),
    )


def _engine(settings: Settings, name: str, interpreters: SpareInterpreters) -> Engine:
    if settings.model.engine == "echo":
        return EchoEngine(model=name, context_length=settings.model.max_model_len or 8192)
    if settings.model.source == "local" and not (Path(settings.model.name) / "config.json").is_file():
        # The worker would find out too, seconds later.
        raise ConfigError(
            f"configuration: model.name: the folder {settings.model.name} holds no model (no config.json)"
        )
    token = settings.hub_token
    return LocalEngine(
        settings.model,
        settings.deadlines,
        hub_token=token.get_secret_value() if token else None,
        interpreters=interpreters,
        hang_seconds=settings.model.hang_seconds,
        # What a deadline allows must not count as stuck.
        stall_seconds=max(
            settings.model.stall_seconds, settings.deadlines.first_token_seconds + DEADLINE_MARGIN_SECONDS
        ),
    )


def _wrap(
    engine: Engine, settings: Settings, redactor: Redactor | None, metrics: Metrics, access: AccessControl
) -> tuple[Engine, CachedEngine | None]:
    """Put the output filter around the engine and the caches around both, so that nothing unfiltered is stored."""
    scope = "unfiltered"
    if redactor and settings.pii.output == "mask":
        engine = FilteredEngine(engine, redactor, lambda kind, count: metrics.pii(kind, "output", count))
        scope = redactor.fingerprint
    if not settings.cache.enabled:
        return engine, None
    if settings.cache.persistent:
        mask = _storage_filter(redactor).mask if redactor and settings.pii.output == "off" else None
        engine = PersistentCacheEngine(engine, access.response_cache, scope=scope, mask=mask)
    cache = CachedEngine(engine, settings.cache, scope=scope, metrics=metrics)
    return cache, cache


def _access(settings: Settings, redactor: Redactor | None, metrics: Metrics) -> AccessControl:
    configured = settings.security.api_key
    # Logged text is masked even where the filters are off.
    log_filter = _storage_filter(redactor or Redactor())
    return AccessControl(
        settings,
        configured_key=configured.get_secret_value() if configured else None,
        bootstrap_key=None if configured else bootstrap_key(settings.app.data_dir),
        mask=log_filter.mask,
        on_drop=metrics.log_rows_dropped,
    )


def _usage_recorder(settings: Settings, access: AccessControl) -> UsageRecorder:
    return UsageRecorder(
        log=access.log,
        cached_prompt=settings.quota.cached_prompt,
        cached_completion=settings.quota.cached_completion,
        store_text=settings.logging.store_text,
    )


def _redactor(settings: Settings) -> Redactor | None:
    pii = settings.pii
    if not pii.enabled:
        return None
    try:
        return Redactor([PiiKind(name) for name in pii.entities], phone_region=pii.phone_region)
    except ValueError:
        raise ConfigError(f"configuration: pii.phone_region: there is no region {pii.phone_region}") from None


def _input_filter(settings: Settings, redactor: Redactor | None, metrics: Metrics) -> InputFilter | None:
    if redactor is None or settings.pii.input == "off":
        return None
    return InputFilter(redactor, settings.pii.input, lambda kind, count: metrics.pii(kind, "input", count))


def _storage_filter(redactor: Redactor) -> InputFilter:
    """Return what masks stored text, whatever `pii.input` and `pii.output` say."""
    return InputFilter(redactor, "mask", lambda kind, count: None)


def _watch(metrics: Metrics, host: ModelHost, sessions: SessionStore | None) -> None:
    def total(figure: Callable[[ServedModel], int]) -> Callable[[], float]:
        return lambda: sum(map(figure, host.models))

    metrics.watch(
        requests_running=total(lambda model: model.engine.status().running),
        requests_waiting=total(lambda model: model.engine.status().waiting),
        sessions=lambda: sessions.count() if sessions else 0,
        model_loaded=lambda: host.can_serve,
        engine_restarts=total(lambda model: model.engine.status().restarts),
    )
