"""Defines the settings of Redis, which several processes share so that they behave as one."""

import base64
import binascii
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, field_validator

from app.config.section import Section

SCHEMES = (
    *("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    *("valkey", "valkeys"),
)
"""Of the URL: those of redis-py, and of the `limits` library for Sentinel and Cluster; Valkey's are the first two."""

KEY_BYTES = 32


class RedisConfig(Section):
    """Redis or Valkey; without it limits, sessions and the response cache are those of one process."""

    url: SecretStr | None = None
    """redis://, rediss:// (TLS), unix://, redis+sentinel://host,host/name/database or redis+cluster://host,host."""
    password: SecretStr | None = None
    """Takes precedence over one in the URL."""
    sentinel_password: SecretStr | None = None
    """Of the Sentinels themselves, where they have one."""
    timeout_seconds: Annotated[float, Field(ge=0.05, le=0.25)] = 0.2
    """Time for a reply, for which commands before it may have to be waited, too; after it Redis counts as away, and
    nobody waits for it until it answers again."""
    probe_seconds: PositiveFloat = 1
    """Pause between two attempts to reach a Redis that was away."""
    replicas: PositiveInt = 1
    """Replicas of the service over one database.  While Redis is away each grants this share of the rate limits."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "llm-service"
    """First part of every key in Redis; services that must not share anything take different ones."""
    lease_seconds: Annotated[float, Field(ge=1)] = 20
    """Time after which what a dead process held is free again."""

    encryption_key: SecretStr | None = None
    """Encrypts what is stored of texts: 32 bytes in base64.  Of several, parted by commas, the first encrypts, and all
    decrypt."""

    @property
    def encryption_keys(self) -> tuple[bytes, ...]:
        """The keys themselves, the one that encrypts first."""
        return _keys(self.encryption_key.get_secret_value()) if self.encryption_key else ()

    @field_validator("url", "password", "sentinel_password", "encryption_key")
    @classmethod
    def _blank_is_unset(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value() else None

    @field_validator("encryption_key")
    @classmethod
    def _usable_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _keys(value.get_secret_value())
        return value

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and value.get_secret_value().partition("://")[0].lower() not in SCHEMES:
            raise ValueError(f"the URL begins with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
        return value


def _keys(text: str) -> tuple[bytes, ...]:
    """Raises: ValueError: one is not 32 bytes in base64."""
    try:
        keys = tuple(base64.b64decode(part.strip(), altchars=b"-_", validate=True) for part in text.split(","))
    except (binascii.Error, ValueError):
        keys = ()
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError("a key is 32 random bytes in base64, as `openssl rand -base64 32` writes them")
    return keys
