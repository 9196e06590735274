"""The composition: builds every object of the service once, in the order in which data meets them.

`create_app` reads nothing but its settings and the files they name.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain

import anyio
import structlog
from fastapi import FastAPI

from app.access.access import AccessControl
from app.access.admission import AdmissionControl
from app.access.bootstrap_key import KEY_FILE, bootstrap_key
from app.config import Settings, load_settings
from app.engine.adapters import AdapterRegistry
from app.engine.alias_follower import AliasFollower
from app.engine.base import EncoderEngine, Engine
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.model_source import FetchModel, LoadSpec, no_registry
from app.engine.model_states import model_figures, upstream_figures
from app.engine.registered_models import RegisteredModels
from app.engine.served_model import Served
from app.engine.trial import Trial
from app.errors import ConfigError
from app.generation.batch_runner import BatchRunner
from app.generation.embedding import EmbeddingService
from app.generation.metering import UsageRecorder
from app.generation.service import GenerationService
from app.generation.sessions import SessionStore
from app.model_builder import Filters, ModelBuilder, registered_models
from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redactor
from app.stores.history import History
from app.stores.memory_admission import MemoryAdmissionStore
from app.stores.redis_stores import RedisStores
from app.telemetry import Metrics, configure_logging, disable_foreign_tracing
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import EngineState
from app.web.app_factory import build_app
from app.web.http.authentication import Keys
from app.web.http.dependencies import Container, Service
from app.web.http.openapi import DocumentedApp
from app.web.http.rate_limits import FailedKeyLimiter
from app.web.openai.batch_routes import BatchRoutes

_log = structlog.get_logger("llm_service")

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
    fetch: FetchModel = no_registry,
) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args: each takes the place of what is built otherwise:
        engines: by public model name; the first serves requests that name no model, and all are loaded at start.
        encoders: the same for models that only embed; without a name a request gets the first of them.
        service: what the routes that generate call.
        keys: knows whose an API key is.
        sessions: where conversations are stored.
        fetch: brings the files of models whose source is a registry.
    Raises: ConfigError: a file that the settings name is missing, or something in them cannot be used.
    """
    disable_foreign_tracing(settings.langsmith)
    require_shared_state(settings)
    specs = {} if engines else _specs(settings)
    names = _model_names(settings, specs, engines, encoders)
    known_names = {*names, *specs}
    metrics = Metrics(known_names)
    tracer = _tracer(settings)
    redactor = _redactor(settings)
    pool = RedactionPool(redactor, REDACTION_PROCESSES)
    filters = Filters(settings, redactor, pool, metrics)
    access = _access(settings, filters, metrics)
    registered = registered_models(settings, specs.values())
    redis = RedisStores(settings) if settings.redis.url else None
    history = History.of(settings, redis.connection if redis else None, sessions)
    builder = ModelBuilder(
        settings,
        filters,
        metrics,
        access,
        registered.fetch if registered else fetch,
        shared_cache=history.cache,
        tracer=tracer,
    )
    build = partial(builder.configured, specs=specs, engines=engines, encoders=encoders)
    host = ModelHost(build, default=names[0], adapters=_adapters(settings, names[0], known_names))
    loader = _loader(settings, host, builder, names, specs, metrics)
    limits = redis.admission if redis else MemoryAdmissionStore()
    admission = AdmissionControl(limits, access.quotas, on_refusal=metrics.limit_reached, tracer=tracer)
    usage = _usage_recorder(settings, access)
    generation: Service = service or GenerationService(
        host=host,
        input_filter=filters.of_input(),
        storage_filter=filters.of_storage() if settings.pii.enabled else None,
        sessions=history.sessions,
        metrics=metrics,
        admission=admission,
        usage=usage,
        waiting_seconds=settings.deadlines.waiting_seconds,
        tracer=tracer,
    )
    embeddings = EmbeddingService(
        host=host,
        input_filter=filters.of_input(),
        metrics=metrics,
        admission=admission,
        usage=usage,
        waiting_seconds=settings.deadlines.waiting_seconds,
        tracer=tracer,
    )
    _watch(metrics, host, history.sessions, max_adapters=settings.adapters.max_loaded)
    if redis is not None:
        metrics.watch_redis(away=lambda: redis.connection.fault is not None)
    container = Container(
        settings=settings,
        service=generation,
        embeddings=embeddings,
        host=host,
        loader=loader,
        registered=registered,
        sessions=history.sessions,
        responses=history.responses,
        batches=_batch_runner(settings, access, host, metrics, tracer) if settings.batches.enabled else None,
        keys=keys or access.authenticator,
        access=access,
        admission=admission,
        failed_keys=FailedKeyLimiter(
            settings.security.failed_keys_per_minute,
            on_refusal=metrics.limit_reached,
            shared=redis.failed_keys if redis else None,
            processes=settings.processes,
        ),
        redis=redis.connection if redis else None,
        metrics=metrics,
        tracer=tracer,
    )
    follower = None if registered is None else _follower(settings, registered, loader, host)
    return build_app(container, lifespan=partial(_lifespan, pool=pool, follower=follower, redis=redis, history=history))


def require_shared_state(settings: Settings) -> None:
    """Raises: ConfigError: several processes that share no state would not behave as one."""
    if settings.processes == 1 or settings.redis.url:
        return
    if settings.chat_history.enabled:
        wrong = "would each remember other conversations and grant the whole rate limits"
    elif settings.rate_limit.per_process:
        return
    else:
        wrong = "would each grant the whole rate limits"
    raise ConfigError(
        f"configuration: {settings.processes} processes (app.workers times redis.replicas) {wrong}: set redis.url, or "
        "chat_history.enabled: false and rate_limit.per_process: true"
    )


def _specs(settings: Settings) -> dict[str, LoadSpec]:
    """Return the configured models that generate, by their names, the default one first.

    Raises: ConfigError: one is the name of two.
    """
    configured = [(settings.model, settings.remote)]
    configured += [(each.config(settings.model), each.remote or settings.remote) for each in settings.models]
    specs: dict[str, LoadSpec] = {}
    for config, remote in configured:
        name = config.public_name
        if name in specs:
            raise ConfigError(f"configuration: models: two have the name {name}; set served_name")
        specs[name] = LoadSpec(name=name, config=config, remote=remote if config.engine == "remote" else None)
    return specs


def _loader(
    settings: Settings,
    host: ModelHost,
    builder: ModelBuilder,
    names: Collection[str],
    specs: Mapping[str, LoadSpec],
    metrics: Metrics,
) -> ModelLoader:
    """Add the models that are loaded at the start to the host, and return what loads the others."""
    preloaded = [name for name in names if name not in specs or _preloads(settings, name)]
    for name in preloaded:
        host.add(name)
    return ModelLoader(
        host,
        builder.served,
        settings.model,
        loaded=[spec for name, spec in specs.items() if name in preloaded],
        configured=specs.values(),
        on_name=metrics.add_model,
        on_name_gone=metrics.forget_model,
    )


def _adapters(settings: Settings, default_model: str, models: Collection[str]) -> AdapterRegistry:
    """Return the registry of adapters, with those of the configuration.

    Raises: ConfigError: one has the name of a model, or is for a model that is not configured.
    """
    for each in settings.adapters.preload:
        if each.name in models:
            raise ConfigError(f"configuration: adapters.preload: {each.name} is the name of a model, too")
        if each.model is not None and each.model not in models:
            raise ConfigError(f"configuration: adapters.preload: no model of the name {each.model} is configured")
    return AdapterRegistry(settings.adapters, default_model=default_model)


def _preloads(settings: Settings, name: str) -> bool:
    """Return whether a configured model is loaded at the start."""
    entries = {entry.config(settings.model).public_name: entry.preload for entry in settings.models}
    return entries.get(name, settings.model.preload)


def _model_names(
    settings: Settings,
    specs: Mapping[str, LoadSpec],
    engines: Mapping[str, Engine] | None,
    encoders: Mapping[str, EncoderEngine] | None,
) -> list[str]:
    """Return the names of all models, the default one first.

    Raises: ConfigError: one is the name of two.
    """
    names = list(engines or specs)
    encoder = settings.embeddings.public_name
    names += list(encoders if encoders is not None else [encoder] if encoder else [])
    if len(set(names)) < len(names):
        raise ConfigError(f"configuration: embeddings.model: {encoder} is the name of the chat model, too")
    return names


@asynccontextmanager
async def _lifespan(
    app: DocumentedApp,
    *,
    pool: RedactionPool,
    follower: AliasFollower | None,
    redis: RedisStores | None,
    history: History,
) -> AsyncIterator[None]:
    container: Container = app.state.container
    async with anyio.create_task_group() as background:
        background.start_soon(container.metrics.watch_event_loop)
        background.start_soon(container.loader.watch_idle)
        background.start_soon(history.watch)
        if follower is not None:
            background.start_soon(follower.watch)
        running: asyncio.Task[None] | None = None
        if redis is not None:
            background.start_soon(redis.run)
            await redis.connection.open()
        try:
            await container.access.start()
            await container.host.start()
            background.start_soon(container.host.load_adapters)
            if container.batches is not None:
                routes = BatchRoutes(app, max_body_bytes=container.settings.security.max_body_bytes)
                running = asyncio.create_task(container.batches.run(routes))
            yield
        finally:
            with anyio.CancelScope(shield=True):
                if running is not None:
                    running.cancel()
                    await asyncio.wait([running])
                await container.loader.close()
                await container.host.close()
                await container.access.close()
                await history.close()
                await pool.close()
                if redis is not None:
                    await redis.close()
                await asyncio.to_thread(container.tracer.close)
            background.cancel_scope.cancel()


def _follower(settings: Settings, registered: RegisteredModels, loader: ModelLoader, host: ModelHost) -> AliasFollower:
    trial = Trial(
        settings.mlflow.probe_prompt,
        max_tokens=settings.mlflow.probe_tokens,
        seconds=settings.deadlines.total_seconds,
    )
    return AliasFollower(registered, loader, host, poll_seconds=settings.mlflow.poll_seconds, try_out=trial)


def _access(settings: Settings, filters: Filters, metrics: Metrics) -> AccessControl:
    configured = settings.security.api_key
    return AccessControl(
        settings,
        configured_key=configured.get_secret_value() if configured else None,
        bootstrap_key=None if configured else bootstrap_key(settings.app.data_dir),
        mask=partial(filters.of_storage().mask, _LOG_TENANT),
        on_drop=metrics.log_rows_dropped,
    )


def _batch_runner(
    settings: Settings, access: AccessControl, host: ModelHost, metrics: Metrics, tracer: Tracer
) -> BatchRunner:
    def ready() -> list[Served]:
        return [model for model in host.models if model.engine.status().state is EngineState.READY]

    def parallel() -> int:
        # A model that serves its requests in their order would serve all lines before the next live one.
        ordered = all(model.engine.info.capabilities.priority for model in ready())
        return settings.batches.parallel_lines if ordered else 1

    runner = BatchRunner(
        access.batches,
        access.batch_lines,
        content=lambda batch: access.files.content(batch.tenant, batch.input_file_id),
        principal_of=access.verifier.principal_of,
        parallel=parallel,
        can_run=lambda: not host.draining and bool(ready()),
        config=settings.batches,
        tracer=tracer,
    )
    metrics.watch_batches(lambda: runner.counts.batches, lambda: runner.counts.lines)
    return runner


def _tracer(settings: Settings) -> Tracer:
    """Raises: ConfigError: traces are wanted, and what sends them is not installed."""
    if not settings.otel_exporter_otlp_endpoint:
        return NO_TRACER
    try:
        from app.telemetry.otlp import OtlpTracer
    except ImportError:
        raise ConfigError(
            "configuration: OTEL_EXPORTER_OTLP_ENDPOINT: sending traces needs the extra tracing: "
            "pip install --constraint constraints.txt --editable '.[tracing]'"
        ) from None
    tracing = settings.tracing
    return OtlpTracer(
        settings.otel_exporter_otlp_endpoint, wants_texts=tracing.store_text, per_second=tracing.max_per_second
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


def _watch(metrics: Metrics, host: ModelHost, sessions: SessionStore | None, *, max_adapters: int) -> None:
    metrics.watch(
        models=lambda: map(model_figures, host.models),
        sessions=lambda: sessions.count() if sessions else 0,
        model_loaded=lambda: host.can_serve,
        max_adapters=max_adapters,
    )
    metrics.watch_upstreams(lambda: chain.from_iterable(map(upstream_figures, host.models)))


def __getattr__(name: str) -> FastAPI:
    """Build the application for `uvicorn app.main:app`, from the configuration of the folder that it is started in.

    Only that server asks for this name, so an import of this module still reads nothing.

    Raises: SystemExit: the configuration cannot be used.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = load_settings()
        configure_logging(settings.logging)
        app = create_app(settings)
    except ConfigError as error:
        raise SystemExit(f"llm-service: {error}") from None
    if settings.security.api_key is None:
        _log.info("the API key is in a file", path=str((settings.app.data_dir / KEY_FILE).resolve()))
    return app
