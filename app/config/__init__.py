"""The configuration: typed settings and their loader.  Nothing is read at import."""

from app.config.access import DatabaseConfig, QuotaConfig, RateLimitConfig, UsageLogConfig
from app.config.adapters import AdaptersConfig
from app.config.embeddings import EmbeddingsConfig
from app.config.loading import load_settings
from app.config.section import Section
from app.config.sections import (
    AppConfig,
    CacheConfig,
    ChatHistoryConfig,
    DeadlineConfig,
    LoggingConfig,
    ModelConfig,
    PiiConfig,
    SecurityConfig,
    Settings,
)

__all__ = [
    "AdaptersConfig",
    "AppConfig",
    "CacheConfig",
    "ChatHistoryConfig",
    "DatabaseConfig",
    "DeadlineConfig",
    "EmbeddingsConfig",
    "LoggingConfig",
    "ModelConfig",
    "PiiConfig",
    "QuotaConfig",
    "RateLimitConfig",
    "Section",
    "SecurityConfig",
    "Settings",
    "UsageLogConfig",
    "load_settings",
]
