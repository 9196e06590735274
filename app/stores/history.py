"""Where conversations and answers are stored: in this process, or in the Redis of all replicas."""

from dataclasses import dataclass

from app.access.background import periodic
from app.config import Settings
from app.errors import ConfigError
from app.generation.responses import MemoryResponseStore, ResponseStore
from app.generation.sessions import MemorySessionStore, SessionStore
from app.stores.encryption import Encryption
from app.stores.redis_connection import RedisConnection
from app.stores.redis_response_cache import RedisResponseCache
from app.stores.redis_responses import RedisResponseStore
from app.stores.redis_sessions import COUNT_SECONDS, RedisSessionStore


@dataclass(frozen=True, slots=True)
class History:
    """The stores of one application."""

    sessions: SessionStore | None
    """None if session memory is switched off."""
    responses: ResponseStore | None
    """None under the same condition."""
    cache: RedisResponseCache | None
    """What replicas share beside the cache in each one's memory; None for that of the database, or none."""

    @classmethod
    def of(cls, settings: Settings, redis: RedisConnection | None) -> "History":
        """Return the stores that are configured.

        Raises: ConfigError: the cache is to be in Redis, and none is configured.
        """
        config = settings.chat_history
        if redis is None:
            if settings.cache_store == "redis":
                raise ConfigError("configuration: cache.persistent: redis needs redis.url")
            if not config.enabled:
                return cls(None, None, None)
            return cls(MemorySessionStore(config), MemoryResponseStore(config), None)
        encryption = Encryption(settings.redis.encryption_keys)
        in_redis = settings.cache_store == "redis"
        cache = RedisResponseCache(redis, settings.cache.ttl_seconds, encryption) if in_redis else None
        if not config.enabled:
            return cls(None, None, cache)
        sessions = RedisSessionStore(redis, config, encryption)
        return cls(sessions, RedisResponseStore(redis, config, encryption), cache)

    async def watch(self) -> None:
        """Count the sessions of all replicas for ever, where they are in Redis."""
        if isinstance(self.sessions, RedisSessionStore):
            await periodic(COUNT_SECONDS, self.sessions.refresh_count)

    async def close(self) -> None:
        """Write what is being written, and end what runs in the background."""
        if isinstance(self.sessions, RedisSessionStore):
            await self.sessions.close()
        if self.cache is not None:
            await self.cache.close()
