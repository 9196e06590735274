"""Builds every object of the service once, in the order in which data meets them, and puts the application together.

The only place that knows all packages.  `create_app` reads nothing but its settings and the files they name.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from app.access.access import Access
from app.access.bootstrap_key import first_key
from app.config import Settings
from app.engine.base import Engine
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.engine.local import LocalEngine
from app.engine.persistent_cache import StoredEngine
from app.errors import ConfigError
from app.generation.metering import Accounts
from app.generation.prompts import read_prompt
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore
from app.langchain.chains import Chains
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.redactor import PiiKind, Redactor
from app.telemetry import Metrics, disable_foreign_tracing
from app.web.app_factory import build_app
from app.web.http.dependencies import Container
from app.web.http.rate_limits import RateLimits

HANG_SECONDS = 120.0
"""A worker that has work and says nothing for so long is ended and started again."""


def create_app(settings: Settings, *, engine: Engine | None = None) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args: engine: serves instead of the configured model, for tests.
    Raises: ConfigError: a file that the settings name is missing or cannot be used.
    """
    disable_foreign_tracing(settings.langsmith)
    model = settings.model.public_name
    metrics = Metrics([model])
    redactor = _redactor(settings)
    access = _access(settings, redactor, metrics)
    served, cache = _serve_through(engine or _engine(settings, model), settings, redactor, metrics, access)
    engines = EngineRegistry({model: served})
    sessions = MemorySessionStore(settings.chat_history) if settings.chat_history.enabled else None
    limits = RateLimits(
        settings.security.failed_keys_per_minute,
        enabled=settings.rate_limit.enabled,
        on_refusal=metrics.rate_limited,
    )
    service = GenerationService(
        engines=engines,
        chains={model: Chains(served, model)},
        input_filter=_input_filter(settings, redactor, metrics),
        sessions=sessions,
        system_prompt=read_prompt(settings.app.prompts_dir, "base_system", {"model_name": model}),
        default_max_tokens=settings.model.max_tokens,
        default_temperature=settings.model.temperature,
        metrics=metrics,
        accounts=_accounts(settings, access, limits),
        waiting_seconds=settings.deadlines.waiting_seconds,
        cache=cache,
    )
    metrics.watch(
        requests_running=lambda: served.status().running,
        requests_waiting=lambda: served.status().waiting,
        sessions=lambda: sessions.count() if sessions else 0,
        model_loaded=lambda: served.status().state == "ready",
        engine_restarts=lambda: served.status().restarts,
    )
    container = Container(
        settings=settings,
        service=service,
        engines=engines,
        keys=access.ring,
        access=access,
        limits=limits,
        metrics=metrics,
    )
    app = build_app(container, lifespan=partial(_lifespan, access=access, engines=engines, metrics=metrics))
    app.state.open_database = access.open
    app.state.wait_ready = served.wait_ready
    app.state.drain = partial(engines.drain, settings.app.shutdown_grace_seconds)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI, *, access: Access, engines: EngineRegistry, metrics: Metrics) -> AsyncIterator[None]:
    watching = asyncio.create_task(metrics.watch_event_loop())
    try:
        await access.start()
        await engines.start()
        yield
    finally:
        await engines.close()
        await access.close()
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def _access(settings: Settings, redactor: Redactor | None, metrics: Metrics) -> Access:
    configured = settings.security.api_key
    # What is written down is masked even where the filters are off.
    log_filter = InputFilter(redactor or Redactor(), "mask", lambda kind, count: None)
    return Access(
        settings,
        configured_key=configured.get_secret_value() if configured else None,
        first_key=None if configured else first_key(settings.app.data_dir),
        mask=log_filter.mask,
        on_drop=metrics.log_rows_dropped,
    )


def _accounts(settings: Settings, access: Access, limits: RateLimits) -> Accounts:
    return Accounts(
        rate=limits,
        quota=access.quotas,
        journal=access.log,
        cached_prompt=settings.quota.cached_prompt,
        cached_completion=settings.quota.cached_completion,
        keep_text=settings.logging.store_text,
    )


def _engine(settings: Settings, model: str) -> Engine:
    if settings.model.engine == "echo":
        return EchoEngine(model=model, context_length=settings.model.max_model_len or 8192)
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
        # A long prompt is silent work: what a deadline allows must not count as hung.
        hang_seconds=max(HANG_SECONDS, settings.deadlines.first_token_seconds + 30),
    )


def _redactor(settings: Settings) -> Redactor | None:
    pii = settings.pii
    if not pii.enabled:
        return None
    try:
        return Redactor([PiiKind(name) for name in pii.entities], phone_region=pii.phone_region)
    except ValueError:
        raise ConfigError(f"configuration: pii.phone_region: there is no region {pii.phone_region}") from None


def _serve_through(
    engine: Engine, settings: Settings, redactor: Redactor | None, metrics: Metrics, access: Access
) -> tuple[Engine, CachedEngine | None]:
    """Put the output filter around the model and the cache around both, so that nothing unfiltered is ever kept."""
    scope = "unfiltered"
    if redactor and settings.pii.output == "mask":
        engine = FilteredEngine(engine, redactor, lambda kind, count: metrics.pii(kind, "output", count))
        scope = redactor.fingerprint
    if not settings.cache.enabled:
        return engine, None
    if settings.cache.persistent:
        engine = StoredEngine(engine, access.answers, scope=scope)
    cache = CachedEngine(engine, settings.cache, scope=scope, metrics=metrics)
    return cache, cache


def _input_filter(settings: Settings, redactor: Redactor | None, metrics: Metrics) -> InputFilter | None:
    if redactor is None or settings.pii.input == "off":
        return None
    return InputFilter(redactor, settings.pii.input, lambda kind, count: metrics.pii(kind, "input", count))
