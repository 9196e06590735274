"""What can be set: one small frozen model for each part, each field with its unit and consequence.  Reads nothing."""

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
    YamlConfigSettingsSource,
)

from app.config.access import DatabaseConfig, QuotaConfig, RateLimitConfig, UsageLogConfig
from app.config.section import Section

KNOWN_DEFAULT_KEYS = frozenset(
    ["change-me", "changeme", "change-me-in-env", "your-api-key-here", "your-secure-api-key-here", "your_key", "secret"]
)
"""Keys that stand in published examples: whoever starts with one has no key at all."""

MIN_KEY_CHARS, MAX_KEY_CHARS = 8, 512


class AppConfig(Section):
    """Where the service listens and keeps its files."""

    name: str = "LLM service"
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 makes the service reachable from other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port; 0 takes a free one."""
    data_dir: Path = Path("data")
    """Folder for the embedded database and the first API key; made when missing."""
    prompts_dir: Path = Path("prompts")
    """Folder with our own words: base_system.txt is the system prompt of every chat that brings none."""
    shutdown_grace_seconds: NonNegativeInt = 25
    """How long running answers may finish after SIGTERM before they are ended."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses of reverse proxies whose X-Forwarded-For is believed."""

    @field_validator("trusted_proxies")
    @classmethod
    def _no_wildcard(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("'*' would let any client forge its address; list the proxies")
        return value


class ModelConfig(Section):
    """Which model is served, and how."""

    name: str = "models/tiny-chat"
    """A folder (source local) or a Hugging Face model id (source hub)."""
    source: Literal["local", "hub"] = "local"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights' type; auto is the model's own on a GPU, and on a CPU bfloat16 if that is the model's own and the CPU
    computes in it, else float32; float32 too for weights of 8 bits that a program of ours computes."""
    quantization: Literal["none", "int8"] = "none"
    """int8 rounds the weights of a CPU's linear layers to 8 bits: they take a quarter of their float32 memory and
    single answers come faster, but log-probabilities change; /v1/models tells by how much."""
    compile: Literal["auto", "none", "layers"] = "auto"
    """What is compiled for this machine when the model is loaded.  On a CPU, by a C++ compiler (two seconds at the
    first start): auto is all layers of the families that have a native decoder, linear layers and attention of the
    others, and nothing where there is no compiler; layers refuses a model without a native decoder.  In bfloat16 on a
    processor with AMX auto leaves linear layers to oneDNN.
    On a GPU layers are compiled by torch, a slower start, and only if asked for."""
    revision: str | None = None
    """Commit or tag of the model on the hub."""
    engine: Literal["auto", "batching", "serial", "echo"] = "auto"
    """batching runs many requests at once, serial one; echo needs no model and repeats the prompt; auto is batching, or
    serial for a model that cannot be batched."""
    max_tokens: PositiveInt = 512
    """New tokens when a request names no max_tokens (less where the context window is nearly full)."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Temperature when a request names none; 0 is greedy."""
    max_model_len: PositiveInt | None = None
    """Context window in tokens; the model's own when unset, never more."""
    max_batch_size: PositiveInt | None = None
    """Answers made at once; unset takes what memory has room for, 32 at most."""
    prefix_reuse: bool = True
    """Start a prompt from what was computed before for the same tenant, as in the next turn of a conversation."""
    max_waiting: NonNegativeInt = 64
    """Requests that may wait for the model; one more is refused with 503."""
    max_waiting_tokens: PositiveInt = 65_536
    """Tokens of their prompts together; one request may always wait."""
    threads: NonNegativeInt = 0
    """CPU threads of the model; 0 takes one for each core."""

    @property
    def public_name(self) -> str:
        """The name clients see: the model id, or the folder's own name and never its path on this machine."""
        if self.engine == "echo":
            return "echo"
        return Path(self.name).resolve().name if self.source == "local" else self.name


class DeadlineConfig(Section):
    """How long a request may take, in seconds; over it the request ends with 504."""

    waiting_seconds: PositiveFloat = 30
    """Until the session is free, and from there until the model starts on it."""
    first_token_seconds: PositiveFloat = 60
    """From the model's start until the first token."""
    total_seconds: PositiveFloat = 300
    """From when the model takes the request, running or waiting, until the last token."""


class SecurityConfig(Section):
    """Who is let in, and what is read from them."""

    api_key: SecretStr | None = None
    """The API key; when unset one is made at the first start and kept in the data folder."""
    max_prompt_chars: PositiveInt = 4000
    """Characters of one prompt or of all messages of one request."""
    max_body_bytes: PositiveInt = 1_048_576
    """Bytes of a request body; more is refused with 413 before it is read."""
    body_timeout_seconds: PositiveFloat = 10
    """How long a client may take to send its body."""
    failed_keys_per_minute: PositiveInt = 20
    """Wrong or missing keys per minute and address before even the answer 401 becomes 429."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that may call from a browser; none by default."""
    docs: bool = False
    """Serve /docs and /openapi.json without a key."""
    metrics_public: bool = True
    """Serve /metrics without a key."""

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
    """The response cache: an identical request of the same tenant gets the stored answer."""

    enabled: bool = True
    size: PositiveInt = 100
    """Answers kept; the least recently used goes first."""
    ttl_seconds: PositiveFloat = 3600
    persistent: bool = False
    """Also keep answers in the database: they outlive a restart and are shared by replicas."""


class ChatHistoryConfig(Section):
    """Session memory: what is kept for a `session_id`."""

    enabled: bool = True
    ttl_seconds: PositiveFloat = 7200
    """A session is forgotten this long after its last turn."""
    max_turns: PositiveInt = 50
    """Turns kept in one session; the oldest goes first."""
    max_bytes: PositiveInt = 262_144
    """Text kept in one session, UTF-8; the oldest turn goes first."""
    max_sessions: PositiveInt = 1000
    """Sessions of one tenant; the least recently used goes first."""


PiiName = Literal["email", "phone", "card", "iban", "ssn", "ip", "api_key"]


class PiiConfig(Section):
    """What is done with personal data in prompts and answers."""

    enabled: bool = True
    input: Literal["mask", "block", "off"] = "mask"
    """mask replaces it by [EMAIL] and the like, block refuses the request with 400."""
    output: Literal["mask", "off"] = "mask"
    entities: tuple[PiiName, ...] = ("email", "phone", "card", "iban", "ssn", "ip", "api_key")
    phone_region: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] = "US"
    """Country whose national phone numbers are recognised; international ones always are."""


class OpenAIConfig(Section):
    """What holds on OpenAI's routes only."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Temperature when a request names none; unset takes what the model's files recommend, else OpenAI's 1."""


class LoggingConfig(Section):
    """One line for each event on standard error, and to a file if named."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["json", "console"] = "json"
    file: Path | None = None
    max_bytes: PositiveInt = 10_485_760
    """Size at which the log file is rotated."""
    backups: NonNegativeInt = 3
    """Rotated log files kept."""
    store_text: bool = False
    """Keep prompts and answers, with personal data masked, in the database's inference log."""


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
        nested_model_default_partial_update=True,
    )

    app: AppConfig = AppConfig()
    model: ModelConfig = ModelConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    security: SecurityConfig = SecurityConfig()
    rate_limit: RateLimitConfig = RateLimitConfig()
    quota: QuotaConfig = QuotaConfig()
    usage_log: UsageLogConfig = UsageLogConfig()
    database: DatabaseConfig = DatabaseConfig()
    cache: CacheConfig = CacheConfig()
    chat_history: ChatHistoryConfig = ChatHistoryConfig()
    pii: PiiConfig = PiiConfig()
    openai: OpenAIConfig = OpenAIConfig()
    logging: LoggingConfig = LoggingConfig()
    huggingface_token: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """For gated models; also read from HF_TOKEN."""
    hf_token: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    database_url: Annotated[SecretStr | None, AfterValidator(_blank_is_unset)] = None
    """Another name of `database.url`, and stronger."""
    langsmith: bool = False
    """Let LangSmith tracing send prompts and answers to its service when its own variables ask for it."""

    @property
    def where_database(self) -> str:
        """The URL of the database: the configured one, or a file in the data folder."""
        given = self.database_url or self.database.url
        return given.get_secret_value() if given else f"sqlite:///{self.app.data_dir / 'service.db'}"

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
        """Put the YAML file below .env, and .env below the environment."""
        yaml_settings = YamlConfigSettingsSource(settings_cls)
        return init_settings, env_settings, dotenv_settings, yaml_settings
