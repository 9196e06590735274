"""The configuration: typed settings and their loader.  Nothing is read at import."""

from app.config.access import DatabaseConfig, QuotaConfig, RateLimitConfig, UsageLogConfig
from app.config.adapters import AdaptersConfig
from app.config.batches import BatchesConfig
from app.config.compat import CompatConfig
from app.config.embeddings import EmbeddingsConfig
from app.config.loading import load_settings
from app.config.mlflow import MlflowConfig
from app.config.model import ModelConfig, ModelEntry, beside
from app.config.redis import RedisConfig
from app.config.section import Section
from app.config.sections import (
    AppConfig,
    CacheConfig,
    ChatHistoryConfig,
    DeadlineConfig,
    PiiConfig,
    SecurityConfig,
    Settings,
)
from app.config.telemetry import LoggingConfig

__all__ = [
    "AdaptersConfig",
    "AppConfig",
    "BatchesConfig",
    "CacheConfig",
    "ChatHistoryConfig",
    "CompatConfig",
    "DatabaseConfig",
    "DeadlineConfig",
    "EmbeddingsConfig",
    "LoggingConfig",
    "MlflowConfig",
    "ModelConfig",
    "ModelEntry",
    "PiiConfig",
    "QuotaConfig",
    "RateLimitConfig",
    "RedisConfig",
    "Section",
    "SecurityConfig",
    "Settings",
    "UsageLogConfig",
    "beside",
    "load_settings",
]
