"""Builds everything that belongs to one model: the engine, its wrappers, the chain over it, and the defaults."""

from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from app.access.access import AccessControl
from app.config import ModelConfig, Settings
from app.config.mlflow import tracking_uri_problem
from app.config.packaged import packaged
from app.configured_models import ConfiguredModels
from app.engine.base import EncoderEngine, Engine
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.encoder import LocalEncoder
from app.engine.local import LocalEngine
from app.engine.model_source import FetchModel, LoadSpec
from app.engine.parsing.parsed_engine import ParsedEngine
from app.engine.persistent_cache import PersistentCacheEngine
from app.engine.registered_models import RegisteredModels
from app.engine.remote.engine import RemoteEngine
from app.engine.served_model import AdapterEngine, SamplingDefaults, Served, ServedEncoder, ServedModel
from app.errors import ConfigError, ModelNotFound
from app.generation.prompts import read_template
from app.ipc.spare_interpreters import SpareInterpreters
from app.langchain.chains import COMPLETION_VARIABLES, SYSTEM_VARIABLES, ModelChains
from app.langchain.embeddings import EngineEmbeddings
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redactor
from app.registry.client import RegistryServer
from app.registry.downloader import Downloader
from app.registry.model_store import ModelStore
from app.registry.model_uri import parse_model_uri
from app.stores.redis_response_cache import RedisResponseCache
from app.telemetry import Metrics, ModelMetrics
from app.telemetry.metrics import Direction
from app.telemetry.tracing import NO_TRACER, Tracer

DEADLINE_MARGIN_SECONDS = 30.0
"""A worker has so much longer for a first token than the deadline, before it counts as stuck."""


class Filters:
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

    def wrap_output(self, engine: Engine) -> tuple[Engine, str]:
        """Put the output filter around an engine.  Returns: the engine, the policy's name for the keys of caches."""
        if not self._pii.enabled or self._pii.output == "off":
            return engine, "unfiltered"
        filtered = FilteredEngine(engine, self._redactor, partial(self._count, "output"), pool=self._pool)
        return filtered, self._redactor.fingerprint

    def _count(self, direction: Direction, kind: PiiKind, count: int) -> None:
        self._metrics.pii(kind, direction, count)


class ModelBuilder:
    """Builds everything that belongs to one model."""

    def __init__(
        self,
        settings: Settings,
        filters: Filters,
        metrics: Metrics,
        access: AccessControl,
        fetch: FetchModel,
        *,
        shared_cache: RedisResponseCache | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Args: shared_cache: takes the place of the database's.  tracer: of requests to other servers."""
        self._settings = settings
        self._filters = filters
        self._metrics = metrics
        self._access = access
        self._fetch = fetch
        self._shared_cache = shared_cache
        self._tracer = tracer
        self._interpreters = SpareInterpreters(
            cache=settings.app.data_dir.absolute() / "compiled", enabled=settings.model.spare_worker
        )

    def configured(self, name: str, *, models: ConfiguredModels) -> Served:
        """Build a model of the configuration, or around an engine that was passed in its place.

        Raises: ModelNotFound: nothing of this name is configured.  ConfigError: its folder holds no model.
        """
        if models.encoders is not None and name in models.encoders:
            return _served_encoder(name, models.encoders[name])
        if models.encoders is None and name == self._settings.embeddings.public_name:
            return _served_encoder(name, self._encoder())
        if name in models.engines:
            return self._served_model(models.engines[name], name, self._settings.model)
        if name not in models.specs:
            raise ModelNotFound("There is no such model.")
        config = models.specs[name].config
        if config.engine not in ("echo", "remote") and config.source == "local":
            _require_model("model.name", config.name, "config.json", roots=self._settings.model.roots)
        return self.served(models.specs[name])

    def served(self, spec: LoadSpec) -> Served:
        """Build a model, whatever it is loaded for."""
        if spec.task == "embed":
            return _served_encoder(spec.name, self._encoder_of(spec))
        config = spec.config.model_copy(update={"served_name": spec.name})
        if config.engine == "echo":
            return self._served_model(
                EchoEngine(model=spec.name, context_length=config.max_model_len or 8192), spec.name, config
            )
        if config.engine == "remote":
            return self._served_model(self._remote(spec), spec.name, config)
        engine = LocalEngine(
            config,
            self._settings.deadlines,
            load_token=spec.hub_token,
            fetch=self._fetch,
            interpreters=self._interpreters,
            metrics=self._metrics.model(spec.name),
            **_supervision(self._settings),
        )
        return self._served_model(engine, spec.name, config)

    def _remote(self, spec: LoadSpec) -> Engine:
        """Raises: ConfigError: no server is named."""
        if spec.remote is None or not spec.remote.base_urls:
            raise ConfigError(
                f"configuration: remote.base_urls: the engine of {spec.name} is remote, and no server is named"
            )
        return RemoteEngine(
            spec.remote,
            self._settings.deadlines,
            name=spec.name,
            max_model_len=spec.config.max_model_len,
            hub_token=_supervision(self._settings)["hub_token"],
            tracer=self._tracer,
        )

    def _served_model(self, engine: Engine, name: str, config: ModelConfig) -> ServedModel:
        embeddings = EngineEmbeddings(embedder=engine, model=name) if _embeds(config, engine) else None
        adapters = engine if isinstance(engine, AdapterEngine) else None
        engine, cache = self._wrap(engine, self._metrics.model(name))
        read = partial(read_template, self._settings.app.prompts_dir, model=name)
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
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                openai_temperature=self._settings.openai.temperature,
            ),
        )

    def _wrap(self, engine: Engine, metrics: ModelMetrics) -> tuple[Engine, CachedEngine | None]:
        """Put the parser around the engine, the output filter around both, and the caches around all.

        So the filter sees messages and not the model's marks, and nothing unfiltered is stored.  Another server parses
        its own model's marks.
        """
        settings = self._settings
        engine, scope = self._filters.wrap_output(engine if isinstance(engine, RemoteEngine) else ParsedEngine(engine))
        if not settings.cache.enabled:
            return engine, None
        if settings.cache_store != "off":
            unmasked = settings.pii.enabled and settings.pii.output == "off"
            engine = PersistentCacheEngine(
                engine,
                self._shared_cache or self._access.response_cache,
                scope=scope,
                claims=self._shared_cache,
                wait_seconds=settings.cache.wait_seconds,
                mask=self._filters.of_storage().mask if unmasked else None,
                on_unreadable=self._metrics.cache_unreadable,
            )
        cache = CachedEngine(engine, settings.cache, scope=scope, metrics=metrics)
        return cache, cache

    def _encoder(self) -> EncoderEngine:
        settings = self._settings
        if settings.embeddings.source == "local":
            # Older releases of sentence-transformers put the transformer's own file into a folder below.
            _require_model("embeddings.model", settings.embeddings.model, "config.json", "modules.json")
        return LocalEncoder(
            settings.embeddings, settings.deadlines, interpreters=self._interpreters, **_supervision(settings)
        )

    def _encoder_of(self, spec: LoadSpec) -> EncoderEngine:
        """Return the engine of an encoder beside the configured one, whose limits it shares."""
        config = spec.config
        own = {
            "model": config.name,
            "source": config.source,
            "device": config.device,
            "dtype": config.dtype,
            "revision": config.revision,
            "max_tokens": config.max_model_len,
            "matryoshka": None,
        }
        return LocalEncoder(
            self._settings.embeddings.model_copy(update=own),
            self._settings.deadlines,
            name=spec.name,
            load_token=spec.hub_token,
            interpreters=self._interpreters,
            **_supervision(self._settings),
        )


def _served_encoder(name: str, encoder: EncoderEngine) -> ServedEncoder:
    return ServedEncoder(name=name, engine=encoder, embeddings=EngineEmbeddings(embedder=encoder, model=name))


def registered_models(settings: Settings, specs: Iterable[LoadSpec]) -> RegisteredModels | None:
    """Return the models of the configured registry; None without one.

    Args: specs: the configured models.
    Raises: ConfigError: one of them is to come from the registry, and its name or the registry's address is no use.
    """
    names = [spec.config.name for spec in specs if spec.config.source == "mlflow"]
    for name in names:
        try:
            parse_model_uri(name)
        except ValueError as error:
            raise ConfigError(f"configuration: model.name: {error}") from None
    uri = settings.where_registry
    if not uri or (reason := tracking_uri_problem(uri)) is not None:
        if names:
            raise ConfigError(f"configuration: mlflow.tracking_uri: {reason if uri else 'is needed by source: mlflow'}")
        return None
    username, password, token = (
        None if secret is None else secret.get_secret_value()
        for secret in (
            settings.mlflow_tracking_username,
            settings.mlflow_tracking_password,
            settings.mlflow_tracking_token,
        )
    )
    limits = settings.mlflow
    server = RegistryServer(
        tracking_uri=uri, timeout_seconds=limits.timeout_seconds, username=username, password=password, token=token
    )
    downloader = Downloader(max_bytes=limits.max_bytes, total_seconds=limits.download_seconds)
    return RegisteredModels(ModelStore(server, settings.app.data_dir.absolute() / "registry", downloader))


def _embeds(config: ModelConfig, engine: Engine) -> TypeGuard[LocalEngine]:
    return isinstance(engine, LocalEngine) and config.embeddings != "none"


def _require_model(key: str, folder: str, *files: str, roots: Iterable[Path] = ()) -> None:
    """Look for a model's folder here: the worker would find out too, seconds later.

    Args: roots: where models usually are; one of nearly this name is suggested.
    Raises: ConfigError: none of the files is there.
    """
    path = Path(folder)
    if any((path / name).is_file() for name in files):
        return
    if path.is_dir():
        raise ConfigError(f"configuration: {key}: the folder {folder} holds no model (no {files[0]})")
    meant = _near_folder(path, path.parent) or next(filter(None, (_near_folder(path, root) for root in roots)), None)
    suggestion = f"; is it {meant}?" if meant else "; a model of the hub needs source: hub"
    raise ConfigError(f"configuration: {key}: there is no folder {folder}{suggestion}")


def _near_folder(wanted: Path, root: Path) -> Path | None:
    """Return the folder below a root whose name is nearest to that of another one; None if none is near."""
    # What comes with the package has the same relative name, whatever folder the service is started in.
    folders = [folder for folder in {root, packaged(root)} if folder.is_dir()]
    names = {each.name for folder in folders for each in folder.iterdir() if each.is_dir()}
    near = get_close_matches(wanted.name, sorted(names), n=1)
    return root / near[0] if near else None


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
