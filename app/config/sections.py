"""Defines the settings: one frozen model per section, each field with its unit and effect.  `loading.py` reads them."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.config.access import DatabaseConfig, QuotaConfig, RateLimitConfig, UsageLogConfig
from app.config.adapters import AdaptersConfig
from app.config.batches import BatchesConfig
from app.config.compat import CompatConfig
from app.config.embeddings import EmbeddingsConfig
from app.config.mlflow import MlflowConfig
from app.config.model import ModelConfig, ModelEntry
from app.config.older_names import ConfigFile, OlderVariables, OwnVariables
from app.config.packaged import packaged
from app.config.redis import RedisConfig
from app.config.remote import RemoteConfig
from app.config.section import Section
from app.config.telemetry import LoggingConfig, TracingConfig, checked_endpoint, checked_protocol

KNOWN_DEFAULT_KEYS = frozenset(
    """change-me changeme change-me-in-env your-api-key-here your-secure-api-key-here your-secret-api-key your_key
    secret""".split()
)
"""Keys from published examples, which protect nothing and are refused."""

MIN_KEY_CHARS, MAX_KEY_CHARS = 8, 512


_IPV4_IN_IPV6 = ipaddress.IPv6Network("::ffff:0:0/96")
_WIDEST_IPV4, _WIDEST_IPV6 = 8, 7
"""Prefix lengths of the widest private networks, 10.0.0.0/8 and fc00::/7."""


def _is_too_wide(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    """Return whether a network is wider than any private one; an IPv4 network may be written as IPv6."""
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_IPV4_IN_IPV6):
        return network.prefixlen - _IPV4_IN_IPV6.prefixlen < _WIDEST_IPV4
    return network.prefixlen < (_WIDEST_IPV4 if network.version == 4 else _WIDEST_IPV6)


class AppConfig(Section):
    """The address of the service, and the folders of its files."""

    name: str = "LLM service"
    """The name that the service gives itself at / and in /health."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 makes the service reachable from other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """API processes on this machine; more than one need Redis, and each loads models of its own."""
    data_dir: Path = Path("data")
    """Folder of the embedded database, the first API key and compiled kernels; created when missing."""
    prompts_dir: Annotated[Path, AfterValidator(packaged)] = Field(default=Path("prompts"), validate_default=True)
    """Folder of prompt templates: base_system.txt is the system prompt of every chat without one."""
    shutdown_grace_seconds: NonNegativeInt = 25
    """How long running requests may take after SIGTERM before they are aborted; a second signal cuts it short."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies whose X-Forwarded-For header is trusted."""

    @property
    def on_loopback(self) -> bool:
        """Whether only programs of this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    @field_validator("trusted_proxies")
    @classmethod
    def _no_wildcard(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("'*' would let any client forge its address; list the proxies")
        for number, entry in enumerate(value, 1):
            try:
                network = ipaddress.ip_network(entry)
            except ValueError:
                raise ValueError(f"entry {number} is no IP address and no network such as 10.0.0.0/8") from None
            if _is_too_wide(network):
                raise ValueError(
                    f"entry {number} holds addresses of any client, who could forge them; list the proxies"
                )
        return value


class DeadlineConfig(Section):
    """Time limits of a request in seconds; exceeding one ends it with 504."""

    waiting_seconds: PositiveFloat = 30
    """Until the session is free, and from then until the model starts the request."""
    first_token_seconds: PositiveFloat = 60
    """From the model's start until the first token."""
    total_seconds: PositiveFloat = 300
    """From when the engine accepts the request, running or waiting, until the last token."""

    def times(self, factor: float) -> "DeadlineConfig":
        """Return deadlines that are so many times as long."""
        return DeadlineConfig(
            waiting_seconds=factor * self.waiting_seconds,
            first_token_seconds=factor * self.first_token_seconds,
            total_seconds=factor * self.total_seconds,
        )


class SecurityConfig(Section):
    """Authentication, and limits of what is read from a client."""

    api_key: SecretStr | None = None
    """The API key; when unset, one is generated at the first start and stored in the data folder."""
    max_prompt_chars: NonNegativeInt = 0
    """Characters of a prompt, or of all messages of a request; 0 is no limit but the model's context window."""
    max_body_bytes: PositiveInt = 1_048_576
    """Bytes of a request body; a longer one is refused with 413 before it is read."""
    body_timeout_seconds: PositiveFloat = 10
    """Time for a client to send its body, from the end of the headers."""
    head_timeout_seconds: PositiveFloat = 10
    """Time for a client to send the request line and headers; then 408, and the connection is closed."""
    half_close_seconds: Annotated[float, Field(ge=0)] = 0.15
    """How long a client that has ended what it sends is still answered, unless a response has begun by then; one that
    has hung up looks the same, and its generation goes on for so long."""
    max_connections: PositiveInt = 4096
    """Open connections in all, fewer where the limit of open files is low; the oldest without a request gives way."""
    max_connections_per_address: PositiveInt = 512
    """The same for one address (IPv6: one /64); trusted proxies are exempt."""
    failed_keys_per_minute: PositiveInt = 20
    """Wrong or missing keys per minute and address before the response 401 becomes 429."""
    cors_origins: tuple[str, ...] = ()
    """Origins that may call from a browser (CORS)."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9.:\[\]-]+$")], ...] = ()
    """Names, in lower case, that the header Host may have, *.example.com for all below one; empty: any.  Probes and
    metrics are served under any."""
    docs: bool | None = None
    """Serve /docs, /redoc and /openapi.json without a key; unset: only where `app.host` is this machine's own address,
    such as 127.0.0.1."""
    page: bool = True
    """Serve the chat page at / to browsers; who uses it needs a key all the same."""
    metrics_public: bool = True
    """Serve /metrics without a key."""
    status_public: bool = True
    """Answer GET /status without a key with what tells nothing of processes, requests and errors; with one in full."""

    @field_validator("api_key")
    @classmethod
    def _usable_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or value.get_secret_value() == "":
            return None
        if value.get_secret_value().lower() in KNOWN_DEFAULT_KEYS:
            raise ValueError("this is a published example, not a secret; remove it and the service makes a key")
        if not re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}", value.get_secret_value()):
            raise ValueError(f"an API key needs {MIN_KEY_CHARS} to {MAX_KEY_CHARS} letters, digits or signs, no spaces")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _listed_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("'*' would let every web page call with its visitor's key; list the origins")
        return value


class CacheConfig(Section):
    """The response cache: an identical request of the same tenant gets the stored completion."""

    enabled: bool = True
    """False neither stores nor finds completions."""
    size: PositiveInt = 100
    """Stored completions; the least recently used is evicted first."""
    ttl_seconds: PositiveFloat = 3600
    """How long a stored completion is used."""
    persistent: Literal["auto", "off", "database", "redis"] = "auto"
    """Also store completions in the database or in Redis: they survive a restart and are shared by replicas.  With
    Redis, one replica generates what several are asked for.  auto is Redis where `redis.url` is set."""
    wait_seconds: PositiveFloat = 30
    """How long a request waits for the same one on another replica, before it is generated here, too."""

    @field_validator("persistent", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        switched = {"true": "database", "false": "off"}
        return switched.get(str(value).lower(), value)


class ChatHistoryConfig(Section):
    """Session memory: the history stored for a `session_id`."""

    enabled: bool = True
    """False refuses requests with a `session_id`."""
    ttl_seconds: PositiveFloat = 7200
    """Lifetime of a session after its last turn."""
    max_turns: PositiveInt = 50
    """Turns stored in one session; the oldest is dropped first."""
    max_bytes: PositiveInt = 262_144
    """UTF-8 bytes of text stored in one session; the oldest turn is dropped first."""
    max_sessions: PositiveInt = 1000
    """Sessions of one tenant; the least recently used is dropped first."""


PiiName = Literal["email", "phone", "card", "iban", "ssn", "ip", "api_key"]


class PiiConfig(Section):
    """Filters for personal data in prompts and completions."""

    enabled: bool = True
    """False looks for nothing, neither in texts nor in what is stored."""
    input: Literal["mask", "block", "off"] = "mask"
    """mask replaces it by placeholders such as [EMAIL], block refuses the request with 400."""
    output: Literal["mask", "off"] = "mask"
    """mask replaces it in completions, off sends them as they are."""
    entities: tuple[PiiName, ...] = ("email", "phone", "card", "iban", "ssn", "ip", "api_key")
    """The kinds that are looked for."""
    phone_regions: tuple[Annotated[str, Field(pattern=r"^[A-Z]{2}$")], ...] = (
        *("US", "GB", "IE", "DE", "AT", "CH", "FR", "BE", "NL", "ES", "PT", "IT", "SE", "PL", "UA", "RU", "TR", "IL"),
        *("SA", "AE", "EG", "ZA", "IN", "PK", "ID", "CN", "JP", "KR", "AU", "BR", "MX", "AR"),
    )
    """Regions whose national phone numbers are detected; international ones always are."""


class OpenAIConfig(Section):
    """Defaults of the OpenAI-compatible routes."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default temperature; unset is what the model's generation_config.json recommends, else OpenAI's 1."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """Fields that the service does not have or cannot honour: refuse names them in a 400, ignore answers without them
    and names them in the header X-Ignored-Fields."""


def _blank_is_unset(value: SecretStr | None) -> SecretStr | None:
    return value if value is not None and value.get_secret_value() else None


class Settings(BaseSettings):
    """The whole configuration.  Environment: SECTION__KEY, for example MODEL__NAME."""

    model_config = SettingsConfigDict(
        env_nested_delimiter="__",
        env_ignore_empty=True,
        env_file_encoding="utf-8",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    app: AppConfig = AppConfig()
    model: ModelConfig = ModelConfig()
    models: tuple[ModelEntry, ...] = ()
    remote: RemoteConfig = RemoteConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    security: SecurityConfig = SecurityConfig()
    rate_limit: RateLimitConfig = RateLimitConfig()
    quota: QuotaConfig = QuotaConfig()
    usage_log: UsageLogConfig = UsageLogConfig()
    database: DatabaseConfig = DatabaseConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    chat_history: ChatHistoryConfig = ChatHistoryConfig()
    batches: BatchesConfig = BatchesConfig()
    pii: PiiConfig = PiiConfig()
    openai: OpenAIConfig = OpenAIConfig()
    compat: CompatConfig = CompatConfig()
    mlflow: MlflowConfig = MlflowConfig()
    logging: LoggingConfig = LoggingConfig()
    tracing: TracingConfig = TracingConfig()
    huggingface_token: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """For gated models; also read from HF_TOKEN."""
    hf_token: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """The same; `huggingface_token` takes precedence."""
    database_url: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """Alias of `database.url`, with precedence over it."""
    mlflow_tracking_uri: str = ""
    """The variable of MLflow's own client; `mlflow.tracking_uri` takes precedence."""
    mlflow_tracking_username: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """Who the service is for the MLflow server, with the password."""
    mlflow_tracking_password: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """Of that user."""
    mlflow_tracking_token: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """Instead of a name and a password."""
    otel_exporter_otlp_endpoint: Annotated[str, AfterValidator(checked_endpoint)] = ""
    """The collector that the spans of requests go to; empty: none are made."""
    otel_exporter_otlp_protocol: Annotated[str, AfterValidator(checked_protocol)] = ""
    """http/protobuf, the only one, or empty."""
    langsmith: bool = False
    """Allow LangSmith tracing, which sends prompts and completions to its service if its own variables enable it."""

    @property
    def where_database(self) -> str:
        """The URL of the database: the configured one, or a file in the data folder."""
        given = self.database_url or self.database.url
        return given.get_secret_value() if given else f"sqlite:///{self.app.data_dir / 'service.db'}"

    @property
    def cache_store(self) -> Literal["off", "database", "redis"]:
        """Where completions are stored beside the memory of each process."""
        if self.cache.persistent != "auto":
            return self.cache.persistent if self.cache.enabled else "off"
        return "redis" if self.cache.enabled and self.redis.url else "off"

    @property
    def workers(self) -> int:
        """The number of API processes here: as configured, or as an older service's, where Redis makes them as one."""
        return self.compat.workers if self.app.workers == 1 and self.redis.url else self.app.workers

    @property
    def processes(self) -> int:
        """The number of API processes of all replicas."""
        return self.redis.replicas * self.workers

    @property
    def where_registry(self) -> str:
        """The address of the MLflow server; empty for none."""
        return self.mlflow.tracking_uri or self.mlflow_tracking_uri

    @property
    def serves_docs(self) -> bool:
        """Whether the OpenAPI document and its pages are served: as configured, else on loopback addresses only."""
        return self.app.on_loopback if self.security.docs is None else self.security.docs

    @property
    def hub_token(self) -> SecretStr | None:
        return self.huggingface_token or self.hf_token

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, .env, variables of older services, YAML file."""
        dotenv = OwnVariables(settings_cls, dotenv_settings)
        older = OlderVariables(settings_cls, dotenv)
        return init_settings, env_settings, dotenv, older, ConfigFile(settings_cls)
