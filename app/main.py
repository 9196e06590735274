"""The composition: builds every object of the service once, in the order in which data meets them.

`create_app` reads nothing but its settings and the files they name.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
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
from app.configured_models import ConfiguredModels
from app.engine.alias_follower import AliasFollower
from app.engine.base import EncoderEngine, Engine
from app.engine.host import ModelHost
from app.engine.model_loader import ModelLoader
from app.engine.model_source import no_registry
from app.engine.model_states import model_figures, upstream_figures
from app.engine.probe import PromptProbe
from app.engine.registered_models import RegisteredModels
from app.engine.served_model import Served
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
) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args: each takes the place of what is built otherwise:
        engines: by public model name; the first serves requests that name no model, and all are loaded at start.
        encoders: the same for models that only embed; without a name a request gets the first of them.
        service: what the routes that generate call.
        keys: knows whose an API key is.
    Raises: ConfigError: a file that the settings name is missing, or something in them cannot be used.
    """
    disable_foreign_tracing(settings.langsmith)
    require_shared_state(settings)
    models = ConfiguredModels.of(settings, engines=engines, encoders=encoders)
    metrics = Metrics(models.names)
    tracer = _tracer(settings)
    redactor = _redactor(settings)
    pool = RedactionPool(redactor, REDACTION_PROCESSES)
    filters = Filters(settings, redactor, pool, metrics)
    access = _access(settings, filters, metrics)
    redis = RedisStores(settings) if settings.redis.url else None
    history = History.of(settings, redis.connection if redis else None)
    registered = registered_models(settings, models.specs.values())
    builder = ModelBuilder(
        settings,
        filters,
        metrics,
        access,
        registered.fetch if registered else no_registry,
        shared_cache=history.cache,
        tracer=tracer,
    )
    host = _host(settings, builder, models)
    loader = _loader(settings, host, builder, models, metrics)
    limits = redis.admission if redis else MemoryAdmissionStore()
    admission = AdmissionControl(limits, access.quotas, on_refusal=metrics.limit_reached, tracer=tracer)
    generation, embeddings = _services(settings, host, filters, history, admission, access, metrics, tracer)
    _watch(metrics, host, history.sessions, redis, max_adapters=settings.adapters.max_loaded)
    container = Container(
        settings=settings,
        service=service or generation,
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
        failed_keys=_failed_keys(settings, metrics, redis),
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


def _host(settings: Settings, builder: ModelBuilder, models: ConfiguredModels) -> ModelHost:
    """Return the host, with the models that are loaded at the start."""
    build = partial(builder.configured, models=models)
    host = ModelHost(build, default=models.default, adapters=models.adapters(settings))
    for name in models.preloaded:
        host.add(name)
    return host


def _loader(
    settings: Settings,
    host: ModelHost,
    builder: ModelBuilder,
    models: ConfiguredModels,
    metrics: Metrics,
) -> ModelLoader:
    return ModelLoader(
        host,
        builder.served,
        settings.model,
        loaded=[spec for name, spec in models.specs.items() if name in models.preloaded],
        configured=models.specs.values(),
        on_name=metrics.add_model,
        on_name_gone=metrics.forget_model,
    )


def _services(
    settings: Settings,
    host: ModelHost,
    filters: Filters,
    history: History,
    admission: AdmissionControl,
    access: AccessControl,
    metrics: Metrics,
    tracer: Tracer,
) -> tuple[GenerationService, EmbeddingService]:
    """Return what the routes call that generate, and those that embed."""
    usage = UsageRecorder(
        log=access.log,
        cached_prompt=settings.quota.cached_prompt,
        cached_completion=settings.quota.cached_completion,
        store_text=settings.logging.store_text,
    )
    generation = GenerationService(
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
    return generation, embeddings


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
    probe = PromptProbe(
        settings.mlflow.probe_prompt,
        max_tokens=settings.mlflow.probe_tokens,
        seconds=settings.deadlines.total_seconds,
    )
    return AliasFollower(registered, loader, host, poll_seconds=settings.mlflow.poll_seconds, probe=probe)


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


def _redactor(settings: Settings) -> Redactor:
    pii = settings.pii
    # Logged text is masked even with `pii.enabled: false`.
    kinds = [PiiKind(name) for name in pii.entities] if pii.enabled else list(PiiKind)
    try:
        return Redactor(kinds, phone_regions=pii.phone_regions)
    except ValueError as error:
        raise ConfigError(f"configuration: pii.phone_regions: {error}") from None


def _failed_keys(settings: Settings, metrics: Metrics, redis: RedisStores | None) -> FailedKeyLimiter:
    return FailedKeyLimiter(
        settings.security.failed_keys_per_minute,
        on_refusal=metrics.limit_reached,
        shared=redis.failed_keys if redis else None,
        processes=settings.processes,
    )


def _watch(
    metrics: Metrics, host: ModelHost, sessions: SessionStore | None, redis: RedisStores | None, *, max_adapters: int
) -> None:
    """Let a scrape of the metrics look at what counts itself."""
    metrics.watch(
        models=lambda: map(model_figures, host.models),
        sessions=lambda: sessions.count() if sessions else 0,
        model_loaded=lambda: host.can_serve,
        max_adapters=max_adapters,
    )
    metrics.watch_upstreams(lambda: chain.from_iterable(map(upstream_figures, host.models)))
    if redis is not None:
        metrics.watch_redis(away=lambda: redis.connection.fault is not None)


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
