"""The configuration.  Knows no other package; nothing is read at import."""

from app.config.loading import load_settings
from app.config.sections import (
    AppConfig,
    CacheConfig,
    ChatHistoryConfig,
    DeadlineConfig,
    LoggingConfig,
    ModelConfig,
    PiiConfig,
    RateLimitConfig,
    Section,
    SecurityConfig,
    Settings,
)

__all__ = [
    "AppConfig",
    "CacheConfig",
    "ChatHistoryConfig",
    "DeadlineConfig",
    "LoggingConfig",
    "ModelConfig",
    "PiiConfig",
    "RateLimitConfig",
    "Section",
    "SecurityConfig",
    "Settings",
    "load_settings",
]
